//! Copies of parts of disks, as `qemu-img dd` makes them.

use qtk_block::NoProgress;
use qtk_image::{DdOptions, Format, Image, NewImage, OpenOptions, dd};

use crate::common::{Folder, content};

#[test]
fn copies_what_qemu_copies() {
    let folder = Folder::new();
    std::fs::write(folder.file("disk.raw"), content(4, 300_007)).unwrap();
    folder.qemu_img(&["convert", "-f", "raw", "-O", "qcow2", "disk.raw", "disk.qcow2"]);
    for source in ["disk.raw", "disk.qcow2"] {
        for format in [Format::Raw, Format::Qcow2] {
            for (block_size, count, skip) in [
                (512, None, 0),
                (1000, Some(2), 0),
                (3, Some(5), 2),
                (100, None, 3),
                (65536, None, 1),
                (1 << 20, None, 0),
                (1024, None, 1000),
                (512, Some(0), 0),
                (4096, Some(10), 20),
                (77, Some(3000), 1500),
                (1 << 20, Some(9), 0),
            ] {
                let format_name = format.name();
                let (source_argument, block) = (format!("if={source}"), format!("bs={block_size}"));
                let (count_argument, skip_argument) =
                    (count.map(|count| format!("count={count}")), format!("skip={skip}"));
                let mut arguments =
                    vec!["dd", "-O", format_name, &source_argument, "of=theirs", &block, &skip_argument];
                arguments.extend(count_argument.as_deref());
                let complaint = String::from_utf8(folder.run("qemu-img", &arguments).stderr).unwrap();
                let image = Image::open(folder.file(source), &OpenOptions::default()).unwrap();
                let new = NewImage { format, ..NewImage::default() };
                let options = DdOptions { block_size, count, skip };
                let report = dd(&image, &folder.file("ours"), &new, &options, &NoProgress).unwrap();
                let words = format!("{source} {format_name} {options:?}");
                folder.qemu_img(&["compare", "-s", "-f", format_name, "-F", format_name, "ours", "theirs"]);
                let map = |name: &str| folder.qemu_img(&["map", "--output=json", "-f", format_name, name]);
                assert_eq!(map("ours"), map("theirs"), "{words}");
                assert_eq!(report.skipped_too_far, complaint.contains("cannot skip"), "{words}: {complaint}");
            }
        }
    }
}

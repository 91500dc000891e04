//! Chains made by QEMU's tools, flattened in every way, judged by QEMU's tools.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::common::{Folder, content, noise};
use qtk_block::{BlockRead, NoProgress, Progress, RawFile};
use qtk_image::{Comparison, ConvertReport, Error, FlattenOptions, Format, Image, OpenOptions, compare, flatten};
use qtk_qcow2::CompressionType::{Zlib, Zstd};
use qtk_qcow2::codec::{Compressor, levels, stream_len};
use qtk_qcow2::{CreateOptions, GuestCluster, ImageWriter, MappingKind, PackedCluster};

const MIB: usize = 1 << 20;

/// Three layers of different sizes and cluster sizes: `base`, `mid.qcow2` and `top.qcow2`.
fn chain(base_format: &str, mid: &str, top: &str) -> Folder {
    let folder = Folder::new();
    std::fs::write(folder.file("base.raw"), content(1, 9 * MIB + 70_000)).unwrap();
    let mut base = "base.raw";
    if let Some(options) = base_format.strip_prefix("qcow2,") {
        folder.qemu_img(&["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, "base.raw", "base.qcow2"]);
        std::fs::remove_file(folder.file("base.raw")).unwrap();
        base = "base.qcow2";
    }
    let base_format = base_format.split(',').next().unwrap();
    folder.qemu_img(&["create", "-q", "-f", "qcow2", "-o", mid, "-b", base, "-F", base_format, "mid.qcow2", "14M"]);
    std::fs::write(folder.file("noise"), noise(9, 300_000)).unwrap();
    std::fs::write(folder.file("text"), &content(5, MIB)[5 * (48 << 10)..][..48 << 10]).unwrap();
    folder.qemu_io(
        "mid.qcow2",
        &[
            "write -s noise 1M 300k",
            "write -s text 2100k 700k",
            "write -z 3M 400k",
            "write -P 77 13M 64k",
            "write -P 0 11M 512k",
        ],
    );
    folder.qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        top,
        "-b",
        "mid.qcow2",
        "-F",
        "qcow2",
        "top.qcow2",
        "17408001",
    ]);
    folder
        .qemu_io("top.qcow2", &["write -s noise 1200k 100k", "write -P 3 5M 3k", "write -z 5M 1k", "discard 2M 256k"]);
    folder.qemu_io("top.qcow2", &["write -c -P 9 6M 2M", "write -P 5 15M 70k"]);
    folder
}

fn options(text: &str) -> FlattenOptions {
    let mut options = FlattenOptions::default();
    for word in text.split(' ') {
        match word.split_once('=').unwrap_or((word, "")) {
            ("plain", _) => {}
            ("raw", _) => options.format = Format::Raw,
            ("zlib", _) => options.compression = Some(Zlib),
            ("zstd", _) => options.compression = Some(Zstd),
            ("recompress", _) => options.recompress = true,
            ("level", level) => options.level = Some(level.parse().unwrap()),
            ("cluster", size) => options.cluster_size = Some(size.parse().unwrap()),
            other => panic!("{other:?}"),
        }
    }
    options
}

fn flattened(folder: &Folder, name: &str, options: &FlattenOptions) -> ConvertReport {
    let image = Image::open(folder.file("top.qcow2"), &OpenOptions::default()).unwrap();
    flatten(&image, &folder.file(name), options, &NoProgress).unwrap()
}

/// Flattens a chain in every way, each with the same bytes on all those numbers of threads.
fn flattens(base: &str, mid: &str, top: &str, threads: &[usize]) {
    let folder = chain(base, mid, top);
    for way in [
        "plain",
        "raw",
        "zlib",
        "zstd",
        "zlib recompress level=9",
        "zstd level=1 cluster=2097152",
        "zlib cluster=512",
        "plain cluster=4096",
    ] {
        let mut first: Option<Vec<u8>> = None;
        for &threads in threads {
            flattened(&folder, "out", &FlattenOptions { threads: Some(threads), ..options(way) });
            let bytes = std::fs::read(folder.file("out")).unwrap();
            assert!(first.get_or_insert_with(|| bytes.clone()) == &bytes, "{way}: {threads} threads");
        }
        let format = options(way).format.name();
        if format == "qcow2" {
            folder.check("out");
        }
        folder.qemu_img(&["compare", "-f", "qcow2", "-F", format, "top.qcow2", "out"]);
        let out = Image::open(folder.file("out"), &OpenOptions::default()).unwrap();
        let top = Image::open(folder.file("top.qcow2"), &OpenOptions::default()).unwrap();
        assert_eq!(compare(&top, &out, false, &NoProgress).unwrap(), Comparison::Identical, "{way}");
    }
}

#[test]
fn a_chain_on_raw() {
    flattens("raw", "cluster_size=64k", "cluster_size=4k", &[1, 5]);
}

#[test]
fn a_chain_on_zlib() {
    flattens("qcow2,compression_type=zlib", "cluster_size=64k", "cluster_size=64k", &[1, 2, 3, 64]);
}

#[test]
fn a_chain_on_zstd() {
    flattens("qcow2,compression_type=zstd", "cluster_size=512", "cluster_size=64k,compression_type=zstd", &[2, 64]);
}

#[test]
fn a_chain_on_large_clusters() {
    let base = "qcow2,compression_type=zlib,cluster_size=2M";
    flattens(base, "cluster_size=64k,compat=0.10", "cluster_size=1M", &[1, 5]);
}

#[test]
fn compressed_clusters_are_copied_where_they_can_be() {
    let folder = chain("qcow2,compression_type=zlib", "cluster_size=64k", "cluster_size=64k");
    let copied = flattened(&folder, "copied", &options("zlib"));
    let recompressed = flattened(&folder, "recompressed", &options("zlib recompress"));
    assert!(copied.copied > 50, "{copied:?}");
    assert_eq!((recompressed.copied, recompressed.compressed), (0, copied.copied + copied.compressed));
    assert_eq!(flattened(&folder, "zstd", &options("zstd")).copied, 0);
    assert_eq!(flattened(&folder, "smaller", &options("zlib cluster=32768")).copied, 0);
    let again = Image::open(folder.file("copied"), &OpenOptions::default()).unwrap();
    let again = flatten(&again, &folder.file("again"), &options("zlib"), &NoProgress).unwrap();
    assert_eq!((again.compressed, again.copied), (0, copied.copied + copied.compressed));
    folder.check("again");
    folder.qemu_img(&["compare", "top.qcow2", "again"]);
}

#[test]
fn copies_of_copies_do_not_grow() {
    let folder = Folder::new();
    let disk: Vec<u8> =
        (0..200_u32 << 16).map(|at| b"short streams "[(at >> 16) as usize % 14] ^ (at % 3) as u8).collect();
    std::fs::write(folder.file("base.raw"), disk).unwrap();
    for codec in ["zlib", "zstd"] {
        let codec_option = format!("compression_type={codec}");
        folder.qemu_img(&["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", &codec_option, "base.raw", "top.qcow2"]);
        let size = || folder.file("top.qcow2").metadata().unwrap().len();
        let by_qemu = size();
        for _ in 0..4 {
            let report = flattened(&folder, "out", &options(codec));
            assert!(report.copied > 190, "{report:?}");
            std::fs::rename(folder.file("out"), folder.file("top.qcow2")).unwrap();
            assert!(size() <= by_qemu + 65536, "{codec}: {} after {by_qemu}", size());
        }
        folder.check("top.qcow2");
        folder.qemu_img(&["compare", "-f", "raw", "-F", "qcow2", "base.raw", "top.qcow2"]);
    }
}

/// How many bytes lie between the true ends of an image's compressed clusters and what follows, and how many clusters
/// those are. The last stream of a piece of the file is followed by the rest of its cluster.
fn slack(path: &std::path::Path) -> (u64, usize) {
    let file = std::fs::read(path).unwrap();
    let image = Image::open(path, &OpenOptions::default()).unwrap();
    let layer = image.layers()[0].qcow2().unwrap();
    let cluster = usize::try_from(layer.cluster_size()).unwrap();
    let runs = image.runs(0..image.size()).map(Result::unwrap);
    let mut streams: Vec<(u64, u64)> = runs
        .filter_map(|run| match run.kind {
            MappingKind::Compressed { host, len } => Some((host.0, len)),
            _ => None,
        })
        .map(|(host, len)| {
            let stored = &file[usize::try_from(host).unwrap()..usize::try_from(host + len).unwrap()];
            (host, host + stream_len(layer.compression(), stored, cluster).unwrap() as u64)
        })
        .collect();
    streams.sort_unstable();
    let same_cluster = |one: &(u64, u64), next: &(u64, u64)| (one.1 - 1) / cluster as u64 == next.0 / cluster as u64;
    let neighbours = streams.windows(2).filter(|pair| same_cluster(&pair[0], &pair[1]));
    (neighbours.map(|pair| pair[1].0 - pair[0].1).sum(), streams.len())
}

#[test]
fn copied_streams_end_where_they_end() {
    let folder = Folder::new();
    let text = |seed: u8| {
        (0..(96_u32 << 16)).map(move |at| b"some text"[at as usize % 9] ^ (at >> 13).to_le_bytes()[0] ^ seed)
    };
    std::fs::write(folder.file("base.raw"), text(0).collect::<Vec<u8>>()).unwrap();
    std::fs::write(folder.file("new"), text(77).take(64 << 10).collect::<Vec<u8>>()).unwrap();
    for codec in ["zlib", "zstd"] {
        let codec_option = format!("compression_type={codec}");
        folder.qemu_img(&["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", &codec_option, "base.raw", "base.qcow2"]);
        folder.qemu_img(&["create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2"]);
        // Compressed, zero, and left out, so that copied clusters have all kinds of neighbours on the disk and in the file.
        let places = [3_u32, 4, 10, 16, 31, 50].map(|cluster| format!("write -s new {} 64k", cluster << 16));
        folder.qemu_io("top.qcow2", &places.each_ref().map(String::as_str));
        folder.qemu_io("top.qcow2", &["write -z 1280k 64k", "write -z 2M 128k", "write -P 8 4M 1M"]);
        for threads in [1, 64] {
            let options = FlattenOptions { threads: Some(threads), ..options(codec) };
            let report = flattened(&folder, "out", &options);
            assert!(report.copied > 60 && report.compressed > 5, "{report:?}");
            let (slack, streams) = slack(&folder.file("out"));
            assert_eq!((slack, streams as u64), (0, report.copied + report.compressed), "{codec}, {threads} threads");
            folder.check("out");
            folder.qemu_img(&["compare", "-f", "qcow2", "-F", "qcow2", "top.qcow2", "out"]);
        }
    }
}

/// A deflate stream of one cluster that has `inner` among its bytes, and where.
fn stream_around(inner: &[u8], cluster: usize) -> (Vec<u8>, usize) {
    let mut compressor = Compressor::new(Zlib, None).unwrap();
    let text: Vec<u8> = b"around it ".iter().copied().cycle().take(cluster - inner.len() - 100).collect();
    let mut front = vec![0; cluster];
    let len = compressor.compress(&text, &mut front).unwrap().unwrap();
    front.truncate(len);
    // Not the last block any more: a stored one follows it, with or without a byte for its header, and an empty last one.
    front[0] &= !1;
    let payload = [inner, &[7; 100]].concat();
    let size = u16::try_from(payload.len()).unwrap();
    [&[][..], &[0]]
        .into_iter()
        .map(|header| {
            let front = [&front, header, &size.to_le_bytes(), &(!size).to_le_bytes()].concat();
            ([&front[..], &payload, &[1, 0, 0, 0xff, 0xff]].concat(), front.len())
        })
        .find(|(stream, _)| stream_len(Zlib, stream, cluster) == Ok(stream.len()))
        .unwrap()
}

#[test]
fn streams_within_streams_stay_whole() {
    const CLUSTER: usize = 64 << 10;
    let folder = Folder::new();
    let mut inner = vec![0; CLUSTER];
    let text: Vec<u8> = b"within it ".iter().copied().cycle().take(CLUSTER).collect();
    let len = Compressor::new(Zlib, None).unwrap().compress(&text, &mut inner).unwrap().unwrap();
    let (outer, start) = stream_around(&inner[..len], CLUSTER);
    let create = CreateOptions { size: 20 << 16, ..CreateOptions::default() };
    let file = RawFile::from_file(
        std::fs::File::options().read(true).write(true).create_new(true).open(folder.file("base.qcow2")).unwrap(),
    );
    let mut writer = ImageWriter::new(std::sync::Arc::new(file.unwrap()), "base.qcow2", create).unwrap();
    // At the end of a unit, and at the end of the file.
    for guest in [0, 14, 18].map(GuestCluster) {
        let within = GuestCluster(guest.0 + 1);
        let outer_cluster = PackedCluster { guest, bytes: 0..outer.len(), shared: 0 };
        let shared = (outer.len() - start) as u64;
        let inner_cluster = PackedCluster { guest: within, bytes: start..outer.len(), shared };
        writer.compressed_run(&outer, [outer_cluster, inner_cluster]).unwrap();
    }
    writer.finish().unwrap();
    folder.qemu_img(&["create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2"]);
    folder.qemu_io("top.qcow2", &["write -P 5 128k 64k"]);
    for threads in [1, 64] {
        let report = flattened(&folder, "out", &FlattenOptions { threads: Some(threads), ..options("zlib") });
        assert_eq!((report.copied, report.compressed), (6, 1));
        folder.check("out");
        folder.qemu_img(&["compare", "-f", "qcow2", "-F", "qcow2", "top.qcow2", "out"]);
    }
}

#[test]
fn the_last_stream_of_a_file_is_copied() {
    let folder = Folder::new();
    std::fs::write(folder.file("base.raw"), content(3, MIB)).unwrap();
    for codec in ["zlib", "zstd"] {
        let codec_option = format!("compression_type={codec}");
        folder.qemu_img(&["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", &codec_option, "base.raw", "top.qcow2"]);
        assert_eq!(flattened(&folder, "out", &options(codec)).compressed, 0);
        folder.check("out");
        folder.qemu_img(&["compare", "-f", "raw", "-F", "qcow2", "base.raw", "out"]);
    }
}

#[test]
fn a_stream_cut_off_by_the_end_of_the_file_is_not_copied() {
    let folder = Folder::new();
    std::fs::write(folder.file("base.raw"), [noise(1, 40_000), vec![1; 25_536]].concat()).unwrap();
    folder.qemu_img(&["convert", "-c", "-f", "raw", "-O", "qcow2", "base.raw", "top.qcow2"]);
    let file = std::fs::File::options().write(true).open(folder.file("top.qcow2")).unwrap();
    file.set_len(file.metadata().unwrap().len() - 20_000).unwrap();
    let image = Image::open(folder.file("top.qcow2"), &OpenOptions::default()).unwrap();
    let error = flatten(&image, &folder.file("out"), &options("zlib"), &NoProgress).unwrap_err();
    assert!(error.is_corruption() && error.to_string().contains("top.qcow2"), "{error}");
}

#[test]
fn holes_stay_holes() {
    let folder = Folder::new();
    folder.qemu_img(&["create", "-q", "-f", "raw", "base.raw", "3T"]);
    folder.qemu_img(&["create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "top.qcow2"]);
    folder.qemu_io("top.qcow2", &["write -P 1 2500G 64k", "write -P 0 10G 1M"]);
    for way in ["raw", "plain", "zlib"] {
        let report = flattened(&folder, "out", &options(way));
        assert_eq!((report.disk_size, report.plain_bytes + report.compressed * 65536), (3 << 40, 65536));
        folder.qemu_img(&["compare", "-f", "qcow2", "-F", options(way).format.name(), "top.qcow2", "out"]);
    }
}

#[test]
fn progress_adds_up_to_the_disk() {
    struct Sum(AtomicU64);
    impl Progress for Sum {
        fn advance(&self, bytes: u64) {
            self.0.fetch_add(bytes, Ordering::Relaxed);
        }
    }
    let folder = chain("raw", "cluster_size=64k", "cluster_size=64k");
    let image = Image::open(folder.file("top.qcow2"), &OpenOptions::default()).unwrap();
    let sum = Sum(AtomicU64::new(0));
    flatten(&image, &folder.file("out"), &options("zstd"), &sum).unwrap();
    assert_eq!(sum.0.into_inner(), image.size());
}

#[test]
fn a_damaged_cluster_ends_it_and_leaves_no_output() {
    let folder = Folder::new();
    std::fs::write(folder.file("base.raw"), content(1, 8 * MIB)).unwrap();
    folder.qemu_img(&["convert", "-c", "-f", "raw", "-O", "qcow2", "base.raw", "top.qcow2"]);
    let mut bytes = std::fs::read(folder.file("top.qcow2")).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle..middle + 100_000].fill(0xff);
    std::fs::write(folder.file("top.qcow2"), bytes).unwrap();
    let image = Image::open(folder.file("top.qcow2"), &OpenOptions::default()).unwrap();
    for threads in [1, 4] {
        let options = FlattenOptions { threads: Some(threads), ..options("zstd") };
        let error = flatten(&image, &folder.file("out"), &options, &NoProgress).unwrap_err();
        assert!(error.is_corruption(), "{error}");
    }
    assert_eq!(folder.names(), ["base.raw", "top.qcow2"]);
}

#[test]
fn an_image_that_is_open_for_writing_can_be_flattened() {
    let folder = chain("raw", "cluster_size=64k", "cluster_size=64k");
    for name in ["top.qcow2", "base.raw"] {
        let image = Image::open(folder.file(name), &OpenOptions::writable()).unwrap();
        flatten(&image, &folder.file("out"), &options("plain"), &NoProgress).unwrap();
    }
}

#[test]
fn targets_and_options_that_do_not_go_together_are_refused() {
    let folder = chain("raw", "cluster_size=64k", "cluster_size=64k");
    let image = Image::open(folder.file("top.qcow2"), &OpenOptions::default()).unwrap();
    std::os::unix::fs::symlink("base.raw", folder.file("link")).unwrap();
    let before = std::fs::read(folder.file("base.raw")).unwrap();
    for target in ["base.raw", "mid.qcow2", "top.qcow2", "link"] {
        let error = flatten(&image, &folder.file(target), &options("plain"), &NoProgress).unwrap_err();
        assert!(error.to_string().contains("belongs to the chain"), "{error}");
    }
    for way in ["raw zlib", "level=3", "zlib level=77", "plain cluster=1000", "raw cluster=65536"] {
        let error = flatten(&image, &folder.file("out"), &options(way), &NoProgress).unwrap_err();
        assert!(matches!(error, Error::Invalid { .. } | Error::Codec { .. }), "{way}: {error}");
    }
    assert!(!folder.file("out").exists());
    assert!(std::fs::read(folder.file("base.raw")).unwrap() == before);
}

#[test]
fn qemu_reads_every_level() {
    let folder = Folder::new();
    // Words in no order, of which a better search makes more; text and noise by turns, in half clusters and whole ones; and an
    // end off every border.
    let words: Vec<u8> =
        noise(5, 60_000).iter().flat_map(|word| format!("{:x} ", u32::from(*word).pow(3)).into_bytes()).collect();
    let disk = [content(3, 500_000), noise(4, 1 << 16), words, content(6, 200_001)].concat();
    let len = disk.len();
    std::fs::write(folder.file("top.raw"), disk).unwrap();
    folder.qemu_img(&["convert", "-f", "raw", "-O", "qcow2", "top.raw", "top.qcow2"]);
    for kind in [Zlib, Zstd] {
        let sizes = levels(kind).0.map(|level| {
            let options = FlattenOptions {
                compression: Some(kind),
                level: Some(level),
                threads: Some(2),
                ..FlattenOptions::default()
            };
            let report = flattened(&folder, "out", &options);
            assert!(report.compressed > 4 && report.plain_bytes >= 1 << 16, "{kind:?} {level}: {report:?}");
            folder.check("out");
            folder.qemu_img(&["convert", "-f", "qcow2", "-O", "raw", "out", "out.raw"]);
            let read = std::fs::read(folder.file("out.raw")).unwrap();
            // QEMU's disks end on a sector.
            assert!(read.len() == len.next_multiple_of(512), "{kind:?} {level}");
            assert!(read[..len] == std::fs::read(folder.file("top.raw")).unwrap(), "{kind:?} {level}");
            report.file_size
        });
        let sizes: Vec<_> = sizes.collect();
        assert!(sizes.last() < sizes.first(), "{kind:?}: {sizes:?}");
    }
}

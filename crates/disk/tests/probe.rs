//! What probing finds on volumes made by the real tools, or with the first bytes that theirs have.

#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

mod common;

use common::{Image, MIB, run};
use qtk_disk::{Content, Probe};

fn probe(image: &Image) -> Probe {
    Probe::read(&image.reader()).unwrap()
}

fn made(content: Content, label: &str, uuid: &str) -> Probe {
    Probe { content, label: Some(label.as_bytes().to_vec()), uuid: Some(uuid.to_owned()) }
}

fn bare(content: Content) -> Probe {
    Probe { content, label: None, uuid: None }
}

#[test]
fn knows_volumes_of_the_real_tools() {
    let uuid = "0123abcd-0000-4000-8000-0123456789ab";
    for (kind, content) in [("ext2", Content::Ext2), ("ext3", Content::Ext3), ("ext4", Content::Ext4)] {
        let image = Image::new(16 * MIB);
        run("mke2fs", &["-q", "-t", kind, "-L", "cloudimg-rootfs", "-U", uuid, image.path()]);
        assert_eq!(probe(&image), made(content, "cloudimg-rootfs", uuid));
    }
    let image = Image::new(16 * MIB);
    run("mkswap", &["-q", "-L", "swap", "-U", uuid, image.path()]);
    assert_eq!(probe(&image), made(Content::Swap, "swap", uuid));
    assert_eq!(probe(&Image::fat(8 * MIB, 12, "UEFI")), made(Content::Fat, "UEFI", "1234-ABCD"));
    let image = Image::new(16 * MIB);
    run("sgdisk", &["-n1:0:0", image.path()]);
    assert_eq!(probe(&image), bare(Content::Gpt));
    assert_eq!(probe(&Image::new(16 * MIB)), bare(Content::Empty));
    assert_eq!(probe(&Image::new(700)), bare(Content::Empty));
}

/// Bytes at offsets.
type Parts<'a> = &'a [(u64, &'a [u8])];

#[test]
fn knows_foreign_volumes_by_their_first_bytes() {
    let cases: [(Parts<'_>, Probe); 8] = [
        (
            &[(0, b"XFSB"), (32, &[0x11; 16]), (108, b"data\0")],
            made(Content::Xfs, "data", "11111111-1111-1111-1111-111111111111"),
        ),
        (
            &[(65536 + 64, b"_BHRfS_M"), (65536 + 32, &[0x22; 16]), (65536 + 0x12b, b"fedora\0")],
            made(Content::Btrfs, "fedora", "22222222-2222-2222-2222-222222222222"),
        ),
        (
            &[(0, b"LUKS\xba\xbe\0\x02"), (24, b"secret\0"), (168, b"33333333-3333-3333-3333-333333333333\0")],
            made(Content::Luks, "secret", "33333333-3333-3333-3333-333333333333"),
        ),
        (&[(512, b"LABELONE"), (536, b"LVM2 001")], bare(Content::Lvm)),
        (&[(0, b"hsqs")], bare(Content::Squashfs)),
        (
            &[(0x8001, b"CD001"), (0x8028, b"cidata                          ")],
            Probe { content: Content::Iso9660, label: Some(b"cidata".to_vec()), uuid: None },
        ),
        (&[(3, b"NTFS    "), (510, &[0x55, 0xaa])], bare(Content::Ntfs)),
        (&[(70_000, b"something")], bare(Content::Empty)),
    ];
    for (parts, expected) in cases {
        let image = Image::new(MIB);
        for (offset, bytes) in parts {
            image.write(bytes, *offset);
        }
        assert_eq!(probe(&image), expected);
    }
}

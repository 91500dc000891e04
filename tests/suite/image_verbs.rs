//! The verbs for images as a whole, judged by qemu-img.

use serde_json::json;

use crate::support::{Workshop, fails, json, ok};

fn check(workshop: &Workshop, image: &str) {
    ok(&mut workshop.sh("qemu-img", &format!("check -q {image}")));
}

fn same(workshop: &Workshop, one: &str, other: &str) {
    ok(&mut workshop.sh("qemu-img", &format!("compare {one} {other}")));
}

#[test]
fn create_makes_images_of_every_kind() {
    let workshop = Workshop::new();
    for (options, key, value) in [
        ("--compat v2", "compat", json!("0.10")),
        ("--refcount-bits 1", "refcount-bits", json!(1)),
        ("--lazy-refcounts", "lazy-refcounts", json!(true)),
        ("--extended-l2", "extended-l2", json!(true)),
        ("--compression zstd", "compression-type", json!("zstd")),
        ("--data-file data.raw --data-file-raw", "data-file-raw", json!(true)),
        ("--preallocation metadata", "corrupt", json!(false)),
    ] {
        ok(&mut workshop.qtk(&format!("create --force new.qcow2 -s 5M {options}")));
        check(&workshop, "new.qcow2");
        let info = json(&mut workshop.sh("qemu-img", "info --output=json new.qcow2"));
        assert_eq!(info["format-specific"]["data"][key], value, "{options}");
    }
    fails(&mut workshop.qtk("create --force new.qcow2 -s 5M --compat v2 --extended-l2"), 1, &["new.qcow2"]);
    fails(&mut workshop.qtk("create --force new.qcow2 -s 5M --refcount-bits 3"), 1, &["refcount"]);
    fails(&mut workshop.qtk("create new.qcow2 -s 5M"), 1, &["exists already", "--force"]);
}

#[test]
fn convert_copies_into_new_and_existing_images() {
    let workshop = Workshop::new();
    for options in ["-O raw", "-c zstd", "--compat v2 --cluster-size 512", "-S 0", "-r 1G"] {
        ok(&mut workshop.qtk(&format!("convert --force base.qcow2 -o copy {options}")));
        same(&workshop, "base.qcow2", "copy");
    }
    let size = json(&mut workshop.qtk("info --json base.qcow2"))["virtual-size"].to_string();
    ok(&mut workshop.qtk(&format!("create there.qcow2 -s {size}")));
    ok(&mut workshop.qtk("convert base.qcow2 --into there.qcow2 --target-is-zero"));
    same(&workshop, "base.qcow2", "there.qcow2");
    check(&workshop, "there.qcow2");
    let two = json(&mut workshop.qtk("convert base.qcow2 base.qcow2 -o two.qcow2 --json"));
    assert_eq!(two["virtual-size"].as_u64().unwrap(), 2 * size.parse::<u64>().unwrap());
    fails(&mut workshop.qtk("convert base.qcow2 -o two.qcow2"), 1, &["exists already"]);
    workshop.write("there.raw", &vec![7; size.parse().unwrap()]);
    fails(&mut workshop.qtk("convert base.qcow2 --into there.raw"), 3, &["there.raw"]);
    ok(&mut workshop.qtk("convert base.qcow2 --into there.raw --into-format raw"));
    same(&workshop, "base.qcow2", "there.raw");
    fails(&mut workshop.qtk("convert base.qcow2"), 2, &["--output"]);
}

#[test]
fn equal_clusters_are_stored_once() {
    let workshop = Workshop::new();
    let all = json(&mut workshop.qtk("convert base.qcow2 base.qcow2 -o all.qcow2 --json"));
    assert_eq!(all["shared-clusters"], 0);
    for codec in ["--compat v3", "-c zstd"] {
        let once = json(&mut workshop.qtk(&format!("convert base.qcow2 -o once.qcow2 --force --dedup --json {codec}")));
        let two = format!("convert base.qcow2 base.qcow2 -o two.qcow2 --force --dedup {codec}");
        let report = json(&mut workshop.qtk(&format!("{two} --json")));
        let size = |report: &serde_json::Value| report["file-size"].as_u64().unwrap();
        assert!(size(&report) < size(&once) * 11 / 10, "{report} {once}");
        check(&workshop, "two.qcow2");
        same(&workshop, "all.qcow2", "two.qcow2");
        let line = ok(&mut workshop.qtk(&two));
        assert!(line.starts_with(&format!("shared {} clusters: ", report["shared-clusters"])), "{line}");
    }
    let line = ok(&mut workshop.qtk("flatten base.qcow2 -o flat.qcow2 --cluster-size 4096 --dedup"));
    assert!(line.ends_with(" saved\n"), "{line}");
    ok(&mut workshop.qtk("mkdir flat.qcow2 /new"));
    check(&workshop, "flat.qcow2");
    fails(&mut workshop.qtk("flatten base.qcow2 -o flat.raw --format raw --dedup"), 1, &["flat.raw", "use qcow2"]);
    fails(&mut workshop.qtk("convert base.qcow2 --into two.qcow2 --dedup"), 2, &["--dedup"]);
}

#[test]
fn measure_says_what_qemu_img_says() {
    let workshop = Workshop::new();
    for (ours, theirs) in [
        ("measure --json base.qcow2", "measure --output=json -O qcow2 base.qcow2"),
        ("measure --json -s 1T --extended-l2", "measure --output=json -O qcow2 --size 1T -o extended_l2=on"),
        ("measure --json -O raw base.qcow2", "measure --output=json -O raw base.qcow2"),
    ] {
        assert_eq!(json(&mut workshop.qtk(ours)), json(&mut workshop.sh("qemu-img", theirs)), "{ours}");
    }
}

#[test]
fn snapshots_keep_states_of_the_disk() {
    let workshop = Workshop::new();
    ok(&mut workshop.qtk("create disk.qcow2 -s 3M"));
    let write = |pattern: &str| {
        ok(workshop.sh("qemu-io", "-c").arg(format!("write -P {pattern} 1M 64K")).arg("disk.qcow2"));
    };
    write("1");
    ok(&mut workshop.qtk("snapshot create disk.qcow2 first"));
    write("2");
    let list = json(&mut workshop.qtk("snapshot list --json disk.qcow2"));
    assert_eq!(
        (&list[0]["name"], &list[0]["id"], &list[0]["disk-size"]),
        (&json!("first"), &json!("1"), &json!(3 << 20))
    );
    ok(&mut workshop.qtk("convert --snapshot first disk.qcow2 -o then.qcow2"));
    ok(&mut workshop.qtk("snapshot apply disk.qcow2 first"));
    same(&workshop, "disk.qcow2", "then.qcow2");
    ok(&mut workshop.qtk("snapshot delete disk.qcow2 first"));
    check(&workshop, "disk.qcow2");
    fails(&mut workshop.qtk("snapshot apply disk.qcow2 first"), 1, &["disk.qcow2", "first"]);
}

#[test]
fn bitmaps_record_what_is_written() {
    let workshop = Workshop::new();
    ok(&mut workshop.qtk("create disk.qcow2 -s 3M"));
    ok(&mut workshop.qtk("bitmap add disk.qcow2 one --granularity 128K"));
    ok(&mut workshop.qtk("bitmap add disk.qcow2 two --disabled"));
    ok(&mut workshop.qtk("bitmap merge disk.qcow2 two one"));
    ok(&mut workshop.qtk("bitmap enable disk.qcow2 two"));
    ok(&mut workshop.qtk("bitmap clear disk.qcow2 one"));
    ok(&mut workshop.qtk("bitmap disable disk.qcow2 one"));
    let list = json(&mut workshop.qtk("bitmap list --json disk.qcow2"));
    assert_eq!(list[0], json!({ "name": "one", "granularity": 131_072, "enabled": false, "inconsistent": false }));
    assert_eq!(list[1]["enabled"], json!(true));
    ok(&mut workshop.qtk("bitmap remove disk.qcow2 one"));
    fails(&mut workshop.qtk("bitmap clear disk.qcow2 one"), 1, &["one", "no such bitmap"]);
    check(&workshop, "disk.qcow2");
}

#[test]
fn resize_grows_shrinks_and_never_guesses() {
    let workshop = Workshop::new();
    ok(&mut workshop.qtk("create disk.qcow2 -s 3M"));
    ok(&mut workshop.qtk("resize disk.qcow2 +1M"));
    fails(&mut workshop.qtk("resize disk.qcow2 1M"), 1, &["disk.qcow2", "shrink"]);
    let resized = json(&mut workshop.qtk("resize --json --shrink disk.qcow2 -2M"));
    assert_eq!((&resized["old-size"], &resized["new-size"]), (&json!(4 << 20), &json!(2 << 20)));
    check(&workshop, "disk.qcow2");
    workshop.write("disk.raw", &[7; 1000]);
    fails(&mut workshop.qtk("resize disk.raw 4K"), 3, &["disk.raw"]);
    ok(&mut workshop.qtk("resize -f raw disk.raw 4K"));
    assert_eq!(workshop.path("disk.raw").metadata().unwrap().len(), 4096);
}

#[test]
fn amend_and_repair_change_what_they_say() {
    let workshop = Workshop::new();
    ok(&mut workshop.sh("qemu-img", "create -q -f qcow2 disk.qcow2 3M"));
    ok(&mut workshop.qtk("amend disk.qcow2 --refcount-bits 64"));
    ok(&mut workshop.qtk("amend disk.qcow2 --refcount-bits 16"));
    ok(&mut workshop.qtk("amend disk.qcow2 --compat v2"));
    let info = json(&mut workshop.sh("qemu-img", "info --output=json disk.qcow2"));
    assert_eq!(info["format-specific"]["data"]["compat"], json!("0.10"));
    // A cluster that counts as used although nothing uses it.
    ok(&mut workshop.sh("qemu-img", "create -q -f qcow2 whole.qcow2 3M"));
    let mut bytes = std::fs::read(workshop.path("whole.qcow2")).unwrap();
    let block = 2 << 16;
    bytes[block + 9] = 1;
    bytes.resize(5 << 16, 0);
    workshop.write("leaky.qcow2", &bytes);
    let found = crate::support::run(&mut workshop.qtk("check leaky.qcow2"));
    assert!(found.code == 3 && found.stdout.contains("Leaked cluster 4"), "{}", found.stdout);
    let repaired = json(&mut workshop.qtk("check --json --repair leaks leaky.qcow2"));
    assert_eq!(repaired["leaks-fixed"], json!(1));
    check(&workshop, "leaky.qcow2");
}

#[test]
fn dd_and_bench_work_on_a_part() {
    let workshop = Workshop::new();
    ok(&mut workshop.qtk("dd base.qcow2 -o part.raw -O raw --block-size 1M --skip 1 --count 3"));
    assert_eq!(workshop.path("part.raw").metadata().unwrap().len(), 2 << 20);
    let timed = json(&mut workshop.qtk("bench --json base.qcow2 -c 100 -d 4"));
    assert_eq!(timed["requests"], json!(100));
}

#[test]
fn commit_and_rebase_keep_what_the_overlay_reads_as() {
    let workshop = Workshop::new();
    ok(&mut workshop.qtk("create -b base.qcow2 -F qcow2 overlay.qcow2"));
    ok(&mut workshop.qtk("write overlay.qcow2 /etc/motd --content hello"));
    ok(&mut workshop.qtk("flatten overlay.qcow2 -o expected.qcow2"));
    ok(&mut workshop.qtk("convert base.qcow2 -o other.raw -O raw"));
    ok(workshop.sh("qemu-io", "-f raw other.raw -c").arg("write -P 9 0 1M"));
    ok(&mut workshop.qtk("rebase overlay.qcow2 -b other.raw -F raw"));
    same(&workshop, "overlay.qcow2", "expected.qcow2");
    ok(&mut workshop.qtk("rebase overlay.qcow2 --no-base --compress"));
    same(&workshop, "overlay.qcow2", "expected.qcow2");
    check(&workshop, "overlay.qcow2");
    ok(&mut workshop.qtk("create -b base.qcow2 -F qcow2 overlay.qcow2 --force"));
    ok(&mut workshop.qtk("write overlay.qcow2 /etc/motd --content hello"));
    ok(&mut workshop.qtk("commit overlay.qcow2"));
    same(&workshop, "overlay.qcow2", "base.qcow2");
    check(&workshop, "base.qcow2");
    check(&workshop, "overlay.qcow2");
    assert_eq!(ok(&mut workshop.qtk("cat base.qcow2 /etc/motd")), "hello");
    fails(&mut workshop.qtk("rebase overlay.qcow2 -b base.qcow2"), 2, &["--base-format"]);
    fails(&mut workshop.qtk("commit expected.qcow2"), 1, &["expected.qcow2"]);
}

#[test]
fn a_rate_chooses_the_level() {
    let workshop = Workshop::new();
    for verb in ["flatten", "convert"] {
        for codec in ["zlib", "zstd"] {
            let level = |options: &str| {
                let line = format!("{verb} base.qcow2 -o out.qcow2 -c {codec} --json {options}");
                let report = json(&mut workshop.qtk(line.trim_end()));
                check(&workshop, "out.qcow2");
                std::fs::remove_file(workshop.path("out.qcow2")).unwrap();
                report["level"].as_i64().unwrap()
            };
            let (plain, auto) = (level(""), level("--level auto"));
            assert_eq!(auto, level("--level auto --target-rate 100M"), "{verb} {codec}");
            assert!(plain < auto && level("--level auto --target-rate 1G") < plain, "{verb} {codec}");
            assert_eq!(level("--level 4"), 4);
        }
        assert!(json(&mut workshop.qtk(&format!("{verb} base.qcow2 -o out.qcow2 --json")))["level"].is_null());
        std::fs::remove_file(workshop.path("out.qcow2")).unwrap();
        for (options, word) in [
            ("--level auto", "--compress"),
            ("-c zlib --target-rate 1M", "--level"),
            ("-c zlib --level 3 --target-rate 1M", "--level auto"),
            ("-c zlib --level fast", "auto"),
        ] {
            fails(&mut workshop.qtk(&format!("{verb} base.qcow2 -o out.qcow2 {options}")), 2, &[word]);
        }
    }
}

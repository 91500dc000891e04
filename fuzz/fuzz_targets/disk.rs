//! Any bytes as a disk: partition tables, probing, FAT, fstab. Nothing may panic, hang or take memory out of proportion.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use qtk_block::{BlockWrite, MemoryDisk};
use qtk_disk::{Follow, PartitionTable, Probe, Tree, fat, fstab};

fuzz_target!(|bytes: &[u8]| {
    let _ = fstab::parse(bytes);
    let disk = Arc::new(MemoryDisk::new(4 << 20));
    disk.write_at(&bytes[..bytes.len().min(4 << 20)], 0).expect("memory");
    let _ = PartitionTable::read(&disk);
    let device: Arc<dyn qtk_block::BlockRead> = Arc::clone(&disk) as _;
    let _ = Probe::read(&device);
    if let Ok(volume) = fat::Fat::open(Arc::clone(&disk) as _) {
        let mut queue = vec![fat::Handle::ROOT];
        let mut buffer = [0; 4096];
        for _ in 0..100 {
            let Some(handle) = queue.pop() else { break };
            let _ = (volume.metadata(handle), volume.read_at(handle, &mut buffer, 0));
            if let Ok(entries) = volume.read_dir(handle) {
                queue.extend(entries.iter().take(32).map(|entry| entry.handle));
            }
        }
    }
    if let Ok(tree) = Tree::open(disk, None) {
        let _ = tree.resolve(b"/etc/os-release", Follow::All);
        let _ = tree.read_dir(tree.root());
    }
});

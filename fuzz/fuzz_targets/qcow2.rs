//! Any bytes as a qcow2 file: open, map, read, check, change. Nothing may panic, hang or take memory out of proportion.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use qtk_block::{BlockRead, BlockWrite, MemoryDisk};
use qtk_qcow2::{Layer, Transaction, check};

fn layer(disk: &Arc<MemoryDisk>) -> Option<Layer> {
    Layer::open(Arc::clone(disk) as _, "fuzz").ok()
}

fuzz_target!(|bytes: &[u8]| {
    let disk = Arc::new(MemoryDisk::default());
    disk.write_at(bytes, 0).expect("memory");
    let Some(opened) = layer(&disk) else { return };
    let _ = (opened.snapshots(), opened.bitmaps(), check(&opened));
    let mut at = 0;
    let mut buffer = [0; 512];
    for _ in 0..256 {
        if at >= opened.size() {
            break;
        }
        let Ok(mapping) = opened.mapping(at..opened.size()) else { break };
        assert!(mapping.range.start == at && mapping.range.end > at && mapping.range.end <= opened.size());
        let len = buffer.len().min(usize::try_from(opened.size() - at).unwrap_or(usize::MAX));
        let _ = opened.read_at(&mut buffer[..len], at);
        at = mapping.range.end;
    }
    let size = opened.size();
    let Ok(transaction) = Transaction::begin(Arc::new(opened), None) else { return };
    let offset = size / 2;
    let len = usize::try_from(size - offset).unwrap_or(usize::MAX).min(100_000);
    let content = vec![0xa5; len];
    if transaction.write_at(&content, offset).is_ok() && transaction.commit().is_ok() {
        drop(transaction);
        let changed = layer(&disk).expect("what was committed can be opened");
        let mut read = vec![0; len];
        changed.read_at(&mut read, offset).expect("what was committed can be read");
        assert!(read == content);
    }
});

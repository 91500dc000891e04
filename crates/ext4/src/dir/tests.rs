use std::collections::BTreeMap;

use super::hash::HashFunction;
use super::*;

/// Blocks in memory, at most `capacity` of them.
struct Memory {
    blocks: Vec<Vec<u8>>,
    capacity: usize,
}

impl DirBlocks for Memory {
    fn count(&self) -> u32 {
        u32::try_from(self.blocks.len()).unwrap()
    }

    fn read(&self, block: u32) -> Result<Vec<u8>> {
        Ok(self.blocks[block as usize].clone())
    }
}

impl DirBlocksMut for Memory {
    fn write(&mut self, block: u32, bytes: Vec<u8>) -> Result<()> {
        self.blocks[block as usize] = bytes;
        Ok(())
    }

    fn append(&mut self, bytes: Vec<u8>) -> Result<u32> {
        if self.blocks.len() == self.capacity {
            return Err(Error::NoSpace("block"));
        }
        self.blocks.push(bytes);
        Ok(self.count() - 1)
    }
}

fn format(block_size: usize, checksums: bool) -> DirFormat {
    DirFormat {
        ino: ino(12),
        block_size,
        seed: checksums.then_some(Seed::stored(42)),
        file_types: true,
        may_index: true,
        large: false,
        hash: HashParameters { seed: [1, 2, 3, 4], version: 1, unsigned: false },
    }
}

fn ino(number: u32) -> Ino {
    Ino::new(number).unwrap()
}

fn directory(format: DirFormat, capacity: usize) -> Directory<Memory> {
    let blocks = vec![format.first_block(Ino::ROOT).unwrap()];
    Directory::new(Memory { blocks, capacity }, format, false)
}

fn contents(dir: &Directory<Memory>) -> BTreeMap<Vec<u8>, u32> {
    let mut all = BTreeMap::new();
    dir.for_each(|entry| assert_eq!(all.insert(entry.name.to_vec(), entry.ino), None)).unwrap();
    all
}

/// Adds `count` names of `pad` bytes and more, looks them all up, removes every second one.
fn fill_and_thin(format: DirFormat, count: u32, pad: usize) -> Directory<Memory> {
    let mut dir = directory(format, usize::MAX);
    let name = |number: u32| format!("{:x<pad$}{number}", "").into_bytes();
    for number in 0..count {
        dir.insert(&name(number), ino(number + 20), 1).unwrap();
    }
    for number in 0..count {
        assert_eq!(dir.lookup(&name(number)).unwrap().map(|found| found.ino), Some(number + 20));
    }
    assert_eq!(dir.lookup(b"missing").unwrap(), None);
    assert_eq!(contents(&dir).len(), count as usize);
    for number in (0..count).step_by(2) {
        let found = dir.lookup(&name(number)).unwrap().unwrap();
        dir.remove(found).unwrap();
    }
    for number in 0..count {
        let expected = (number % 2 == 1).then_some(number + 20);
        assert_eq!(dir.lookup(&name(number)).unwrap().map(|found| found.ino), expected);
    }
    dir
}

#[test]
fn grows_from_one_block_to_three_levels() {
    for (block_size, checksums, count, pad, levels) in [
        (1024, true, 20, 0, None),
        (1024, false, 100, 0, Some(0)),
        (1024, true, 5_000, 200, Some(1)),
        (4096, true, 30_000, 0, Some(0)),
    ] {
        let dir = fill_and_thin(format(block_size, checksums), count, pad);
        assert_eq!(dir.is_indexed().then(|| dir.root().unwrap().levels), levels, "{count} entries of {pad}");
    }
    let large = DirFormat { large: true, ..format(1024, true) };
    assert_eq!(fill_and_thin(large, 60_000, 240).root().unwrap().levels, 2);
}

#[test]
fn stays_linear_without_the_feature() {
    let dir = fill_and_thin(DirFormat { may_index: false, ..format(1024, true) }, 300, 8);
    assert!(!dir.is_indexed() && dir.blocks.count() > 1);
}

#[test]
fn a_full_index_and_a_full_disk_leave_the_directory_whole() {
    for capacity in [1, 2, 3, 50, usize::MAX] {
        let mut dir = directory(format(1024, true), capacity);
        let mut count = 0_u32;
        let error = loop {
            match dir.insert(format!("{:y<246}{count}", "").as_bytes(), ino(count + 20), 1) {
                Ok(()) => count += 1,
                Err(error) => break error,
            }
        };
        assert!(matches!(error, Error::NoSpace(_)), "{error}");
        assert_eq!(contents(&dir).len(), count as usize, "{capacity} blocks");
        for number in 0..count {
            assert!(dir.lookup(format!("{:y<246}{number}", "").as_bytes()).unwrap().is_some());
        }
    }
}

/// Endings that give names of 200 times `z` the same legacy hash.
const COLLIDING: &str = "EneTpf F2eeC- F8HX59 GETwFL IN6hSW LOZW8P MOx2fM MVwLUr Mk6MRo NuA1vM PowmtC QUXrht RIIz6n RjYqM8 \
    SN30cO UGc9J8 XMd7_t ZhJjIW bvwnFl cyCcQh dPuEPl dTpYwF eQatUl hfqQy- hlQFiN idXVkP jpjOpp kbbfVz lFY-d5 qsYRyU \
    sfYiJr vpfOcp";

#[test]
fn finds_names_of_equal_hash_in_several_leaves() {
    let hash = HashParameters { seed: [0; 4], version: 0, unsigned: false };
    let names: Vec<_> = COLLIDING.split_whitespace().map(|end| format!("{:z<200}{end}", "").into_bytes()).collect();
    assert!(names.iter().all(|name| hash.hash(HashFunction::Legacy, name) == 0x1234_5678));
    let mut dir = directory(DirFormat { hash, ..format(1024, true) }, usize::MAX);
    for (number, name) in (20..).zip(&names) {
        assert_eq!(dir.lookup(name).unwrap(), None);
        dir.insert(name, ino(number), 1).unwrap();
        dir.insert(format!("other{number}").as_bytes(), ino(number), 1).unwrap();
    }
    for (number, name) in (20..).zip(&names) {
        let found = dir.lookup(name).unwrap().unwrap();
        assert_eq!(found.ino, number);
        dir.remove(found).unwrap();
        assert_eq!(dir.lookup(name).unwrap(), None);
    }
    assert_eq!(contents(&dir).len(), names.len());
}

#[test]
fn moves_to_another_parent() {
    for count in [3, 300] {
        let mut dir = directory(format(1024, true), usize::MAX);
        for number in 0..count {
            dir.insert(format!("n{number}").as_bytes(), ino(20 + number), 1).unwrap();
        }
        let dots = dir.lookup(b"..").unwrap().unwrap();
        assert_eq!(dots.ino, 2);
        dir.replace(dots, ino(77), DIRECTORY).unwrap();
        assert_eq!(dir.lookup(b"..").unwrap().unwrap().ino, 77);
        assert_eq!(dir.lookup(b".").unwrap().unwrap().ino, 12);
        let first = dir.lookup(b"n0").unwrap().unwrap();
        dir.replace(first, ino(5), 7).unwrap();
        assert_eq!(contents(&dir)[&b"n0"[..]], 5);
        assert!(!dir.is_empty().unwrap());
    }
    assert!(directory(format(1024, true), 1).is_empty().unwrap());
}

#[test]
fn damage_is_an_error_with_its_place() {
    let mut dir = fill_and_thin(format(1024, false), 200, 8);
    let good = dir.blocks.blocks.clone();
    for (block, bytes) in good.iter().enumerate() {
        for at in 0..64 {
            for byte in [0, 1, 0x7f, 0xff] {
                dir.blocks.blocks[block][at] = byte;
                // Whatever it answers, it must answer.
                let _ = dir.lookup(b"xxxxxxxx7");
                let _ = dir.for_each(|_| ());
                if let Err(error) = dir.is_empty() {
                    assert!(matches!(error, Error::Corrupt { place: Place::Directory(..), .. }), "{error}");
                }
            }
        }
        dir.blocks.blocks[block].clone_from(bytes);
    }
    dir.blocks.blocks[0][36..40].fill(0xff);
    let damaged = (0..200).filter_map(|number| dir.lookup(format!("xxxxxxxx{number}").as_bytes()).err()).count();
    assert!(damaged > 0);
}

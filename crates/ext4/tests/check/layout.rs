//! Where the structures of an image lie, and how each is sealed: enough to change one so that only its meaning is wrong.

use std::collections::BTreeMap;

/// What a structure is, and what its checksum depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    Superblock,
    Group(u32),
    BlockBitmap(u32),
    InodeBitmap(u32),
    Inode(u32),
    ExtentNode(u32),
    PointerBlock(u32),
    DirLeaf(u32),
    /// With the place of its limit and count.
    DirNode(u32, usize),
    XattrBlock(u64),
    JournalSuperblock,
}

impl Kind {
    /// The same for all structures of a kind.
    pub(crate) fn name(self) -> String {
        format!("{self:?}").split('(').next().unwrap_or_default().to_owned()
    }
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Structure {
    pub(crate) kind: Kind,
    pub(crate) offset: usize,
    pub(crate) len: usize,
}

/// The sizes of an image, and its structures by kind.
pub(crate) struct Layout {
    pub(crate) structures: BTreeMap<String, Vec<Structure>>,
    block_len: usize,
    inode_len: usize,
    desc_len: usize,
    inodes_per_group: u32,
    clusters_per_group: u32,
    first_block: usize,
    groups: u32,
    meta_bg: bool,
    compat: u32,
    incompat: u32,
    ro_compat: u32,
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap())
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn crc(seed: u32, bytes: &[u8]) -> u32 {
    !crc32c::crc32c_append(!seed, bytes)
}

const SB: usize = 1024;

impl Layout {
    pub(crate) fn read(bytes: &[u8]) -> Self {
        let sb = &bytes[SB..SB * 2];
        let block_len = 1024 << u32_at(sb, 24);
        let dynamic = u32_at(sb, 76) > 0;
        let (compat, incompat, ro_compat) = (u32_at(sb, 92), u32_at(sb, 96), u32_at(sb, 100));
        let first_block = u32_at(sb, 20) as usize;
        let blocks = u32_at(sb, 4) as usize;
        let mut layout = Self {
            structures: BTreeMap::new(),
            block_len,
            inode_len: if dynamic { u16_at(sb, 88).into() } else { 128 },
            desc_len: if incompat & 0x80 != 0 { u16_at(sb, 254).into() } else { 32 },
            inodes_per_group: u32_at(sb, 40),
            clusters_per_group: if ro_compat & 0x200 != 0 { u32_at(sb, 36) } else { u32_at(sb, 32) },
            first_block,
            groups: u32::try_from(blocks - first_block).unwrap().div_ceil(u32_at(sb, 32)),
            meta_bg: incompat & 0x10 != 0,
            compat,
            incompat,
            ro_compat,
        };
        layout.add(Kind::Superblock, SB, 264);
        for group in 0..layout.groups {
            layout.add_group(bytes, group);
        }
        layout
    }

    fn add(&mut self, kind: Kind, offset: usize, len: usize) {
        self.structures.entry(kind.name()).or_default().push(Structure { kind, offset, len });
    }

    fn descriptor(&self, bytes: &[u8], group: u32) -> usize {
        let per_block = self.block_len / self.desc_len;
        let meta = group as usize / per_block;
        let block = if self.meta_bg {
            let per_group = u32_at(bytes, SB + 32) as usize;
            let first = self.first_block + meta * per_block * per_group;
            // The groups that this is used for all start with a superblock, or none does.
            first + usize::from(meta == 0 || bytes[first * self.block_len + 56..][..2] == [0x53, 0xef])
        } else {
            let front = usize::from(self.first_block == 0 && self.block_len == 1024);
            self.first_block + front + 1 + meta
        };
        block * self.block_len + group as usize % per_block * self.desc_len
    }

    fn add_group(&mut self, bytes: &[u8], group: u32) {
        let at = self.descriptor(bytes, group);
        self.add(Kind::Group(group), at, self.desc_len.min(64));
        let flags = u16_at(bytes, at + 18);
        let has_flags = self.ro_compat & 0x410 != 0;
        let block = |at: usize| u32_at(bytes, at) as usize * self.block_len;
        let (blocks, inodes, table) = (block(at), block(at + 4), block(at + 8));
        if !has_flags || flags & 2 == 0 {
            self.add(Kind::BlockBitmap(group), blocks, self.clusters_per_group as usize / 8);
        }
        if has_flags && flags & 1 != 0 {
            return;
        }
        self.add(Kind::InodeBitmap(group), inodes, self.inodes_per_group as usize / 8);
        for index in 0..self.inodes_per_group {
            let offset = table + index as usize * self.inode_len;
            if bytes[inodes + index as usize / 8] >> (index % 8) & 1 != 0 {
                self.add_inode(bytes, group * self.inodes_per_group + index + 1, offset);
            }
        }
    }

    fn add_inode(&mut self, bytes: &[u8], ino: u32, offset: usize) {
        let inode = &bytes[offset..offset + self.inode_len];
        self.add(Kind::Inode(ino), offset, self.inode_len);
        let attributes = u32_at(inode, 104);
        if attributes != 0 {
            self.add(Kind::XattrBlock(attributes.into()), attributes as usize * self.block_len, self.block_len);
        }
        let mode = u16_at(inode, 0) >> 12;
        let flags = u32_at(inode, 32);
        let mut data = Vec::new();
        if flags & 0x8_0000 != 0 {
            self.add_extents(bytes, ino, &inode[40..100], &mut data);
        } else if flags & 0x1000_0000 == 0 && matches!(mode, 4 | 8) {
            data.extend((0..12).map(|at| u32_at(inode, 40 + at * 4) as usize).filter(|&block| block != 0));
            for level in 1..=3 {
                self.add_pointers(bytes, ino, u32_at(inode, 40 + (11 + level) * 4) as usize, level, &mut data);
            }
        }
        if ino == 8 && self.compat & 4 != 0 {
            self.add(Kind::JournalSuperblock, data[0] * self.block_len, 128);
        }
        if mode == 4 {
            let indexed = flags & 0x1000 != 0;
            for (at, block) in data.into_iter().enumerate() {
                let place = block * self.block_len;
                let hidden = u32_at(bytes, place) == 0 && bytes[place + 6] == 0 && indexed;
                match (indexed, at) {
                    (true, 0) => self.add(Kind::DirNode(ino, 32), place, self.block_len),
                    _ if hidden => self.add(Kind::DirNode(ino, 8), place, self.block_len),
                    _ => self.add(Kind::DirLeaf(ino), place, self.block_len),
                }
            }
        }
    }

    fn add_extents(&mut self, bytes: &[u8], ino: u32, node: &[u8], data: &mut Vec<usize>) {
        for entry in node[12..].chunks_exact(12).take(u16_at(node, 2).into()) {
            if u16_at(node, 6) == 0 {
                let start = u32_at(entry, 8) as usize;
                data.extend(start..start + usize::from(u16_at(entry, 4)).min(64));
            } else {
                let place = u32_at(entry, 4) as usize * self.block_len;
                self.add(Kind::ExtentNode(ino), place, self.block_len);
                self.add_extents(bytes, ino, &bytes[place..place + self.block_len], data);
            }
        }
    }

    fn add_pointers(&mut self, bytes: &[u8], ino: u32, block: usize, level: usize, data: &mut Vec<usize>) {
        if block == 0 || level == 0 {
            data.extend((block != 0).then_some(block));
            return;
        }
        let place = block * self.block_len;
        self.add(Kind::PointerBlock(ino), place, self.block_len);
        for at in 0..self.block_len / 4 {
            self.add_pointers(bytes, ino, u32_at(bytes, place + at * 4) as usize, level - 1, data);
        }
    }

    fn inode_place(&self, bytes: &[u8], ino: u32) -> usize {
        let table = u32_at(bytes, self.descriptor(bytes, (ino - 1) / self.inodes_per_group) + 8) as usize;
        table * self.block_len + ((ino - 1) % self.inodes_per_group) as usize * self.inode_len
    }

    fn seed(&self, bytes: &[u8]) -> u32 {
        if self.incompat & 0x2000 != 0 { u32_at(bytes, SB + 0x270) } else { crc(!0, &bytes[SB + 104..SB + 120]) }
    }

    fn inode_seed(&self, bytes: &[u8], ino: u32) -> u32 {
        let generation = &bytes[self.inode_place(bytes, ino) + 100..][..4];
        crc(crc(self.seed(bytes), &ino.to_le_bytes()), generation)
    }

    /// Gives the structure the checksum that its bytes need now.
    pub(crate) fn seal(&self, bytes: &mut [u8], structure: &Structure) {
        let Structure { kind, offset, len } = *structure;
        let put = |bytes: &mut [u8], at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        if kind == Kind::JournalSuperblock {
            if bytes[offset + 40..offset + 44].iter().any(|&byte| byte & 0x18 != 0) {
                put(bytes, offset + 252, &[0; 4]);
                let sum = crc(!0, &bytes[offset..offset + 1024]);
                put(bytes, offset + 252, &sum.to_be_bytes());
            }
            return;
        }
        if let (Kind::Group(group), true) = (kind, self.ro_compat & 0x10 != 0) {
            let sum = self.crc16(bytes, group, offset, len);
            return put(bytes, offset + 30, &sum.to_le_bytes());
        }
        if self.ro_compat & 0x400 == 0 {
            return;
        }
        let seed = self.seed(bytes);
        match kind {
            Kind::Superblock => {
                let sum = crc(!0, &bytes[SB..SB + 1020]);
                put(bytes, SB + 1020, &sum.to_le_bytes());
            }
            Kind::Group(group) => {
                put(bytes, offset + 30, &[0; 2]);
                let sum = crc(crc(seed, &group.to_le_bytes()), &bytes[offset..offset + self.desc_len]);
                put(bytes, offset + 30, &sum.to_le_bytes()[..2]);
            }
            Kind::BlockBitmap(group) | Kind::InodeBitmap(group) => {
                let sum = crc(seed, &bytes[offset..offset + len]).to_le_bytes();
                let at = self.descriptor(bytes, group);
                let (low, high) = if matches!(kind, Kind::BlockBitmap(_)) { (24, 56) } else { (26, 58) };
                put(bytes, at + low, &sum[..2]);
                if self.desc_len >= 64 {
                    put(bytes, at + high, &sum[2..]);
                }
                let group = Structure { kind: Kind::Group(group), offset: at, len: self.desc_len };
                self.seal(bytes, &group);
            }
            Kind::Inode(ino) => {
                let wide = self.inode_len > 128 && u16_at(bytes, offset + 128) >= 4;
                put(bytes, offset + 124, &[0; 2]);
                if wide {
                    put(bytes, offset + 130, &[0; 2]);
                }
                let sum = crc(self.inode_seed(bytes, ino), &bytes[offset..offset + len]).to_le_bytes();
                put(bytes, offset + 124, &sum[..2]);
                if wide {
                    put(bytes, offset + 130, &sum[2..]);
                }
            }
            Kind::ExtentNode(ino) => {
                let tail = 12 + 12 * usize::from(u16_at(bytes, offset + 4));
                if tail + 4 <= len {
                    let sum = crc(self.inode_seed(bytes, ino), &bytes[offset..offset + tail]);
                    put(bytes, offset + tail, &sum.to_le_bytes());
                }
            }
            Kind::DirLeaf(ino) => {
                let sum = crc(self.inode_seed(bytes, ino), &bytes[offset..offset + len - 12]);
                put(bytes, offset + len - 4, &sum.to_le_bytes());
            }
            Kind::DirNode(ino, start) => {
                let end = offset + start + usize::from(u16_at(bytes, offset + start + 2)) * 8;
                let sum = crc(self.inode_seed(bytes, ino), &bytes[offset..end.min(offset + len - 8)]);
                let sum = crc(crc(sum, &bytes[offset + len - 8..offset + len - 4]), &[0; 4]);
                put(bytes, offset + len - 4, &sum.to_le_bytes());
            }
            Kind::XattrBlock(block) => {
                put(bytes, offset + 16, &[0; 4]);
                let sum = crc(crc(seed, &block.to_le_bytes()), &bytes[offset..offset + len]);
                put(bytes, offset + 16, &sum.to_le_bytes());
            }
            Kind::PointerBlock(_) | Kind::JournalSuperblock => {}
        }
    }

    fn crc16(&self, bytes: &[u8], group: u32, offset: usize, len: usize) -> u16 {
        let step = |crc: u16, byte: &u8| {
            (0..8).fold(crc ^ u16::from(*byte), |crc, _| if crc & 1 == 0 { crc >> 1 } else { crc >> 1 ^ 0xa001 })
        };
        let group = group.to_le_bytes();
        let parts = [
            &bytes[SB + 104..SB + 120],
            &group,
            &bytes[offset..offset + 30],
            &bytes[offset + 32..offset + len.max(32)],
        ];
        parts.iter().flat_map(|part| part.iter()).fold(!0, step)
    }
}

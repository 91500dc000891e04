//! The options of a new file system, as mke2fs calls them.

use clap::{Args, ValueEnum};
use qtk_ext4::mkfs::{ErrorBehaviour, MkfsOptions, Profile, Reserved, Type, Usage, stable_uuid};

use super::size;

/// What a new file system is to be.
#[derive(Args, Debug)]
pub(crate) struct FileSystemArguments {
    /// Generation of the file system
    #[arg(short = 't', long = "type", value_enum, default_value_t = TypeName::Ext4, value_name = "TYPE")]
    kind: TypeName,

    /// Whose default features it has
    #[arg(long, value_enum, default_value_t = ProfileName::Ubuntu2404)]
    profile: ProfileName,

    /// Volume label, up to 16 bytes
    #[arg(short = 'L', long, default_value = "")]
    label: String,

    /// UUID, or 'random'. Where it is not given it is random; with SOURCE_DATE_EPOCH set it follows from that, the label and
    /// the size
    #[arg(short = 'U', long, value_parser = parse_uuid)]
    uuid: Option<Uuid>,

    /// Block size: a power of two from 1024 to 65536
    #[arg(short = 'b', long, value_name = "SIZE", value_parser = parse_small::<u32>)]
    block_size: Option<u32>,

    /// Inode size: a power of two from 128
    #[arg(short = 'I', long, value_name = "SIZE", value_parser = parse_small::<u16>)]
    inode_size: Option<u16>,

    /// Number of inodes, at least
    #[arg(short = 'N', long, value_name = "NUMBER")]
    inodes: Option<u32>,

    /// One inode for so many bytes
    #[arg(short = 'i', long, value_name = "SIZE", value_parser = size::parse)]
    bytes_per_inode: Option<u64>,

    /// Blocks in a block group
    #[arg(short = 'g', long, value_name = "NUMBER")]
    blocks_per_group: Option<u32>,

    /// Block groups whose metadata lies together
    #[arg(short = 'G', long, value_name = "NUMBER")]
    groups_per_flex: Option<u32>,

    /// Features to add, or to leave out with ^ before them, separated by commas
    #[arg(short = 'O', long, value_name = "FEATURES", default_value = "")]
    features: String,

    /// Extended options as of mke2fs: stride, stripe_width, resize, root_owner, root_perms, hash_seed, num_backup_sb,
    /// orphan_file_size, lazy_itable_init
    #[arg(short = 'E', long, value_name = "OPTIONS", default_value = "")]
    extended: String,

    /// Percentage of blocks that only root may use
    #[arg(short = 'm', long, value_name = "PERCENT", default_value_t = 5.0)]
    reserved_percent: f64,

    /// Space that only root may use, in place of a percentage
    #[arg(long, value_name = "SIZE", value_parser = size::parse, conflicts_with = "reserved_percent")]
    reserved: Option<u64>,

    /// Size of the journal
    #[arg(short = 'J', long, value_name = "SIZE", value_parser = size::parse)]
    journal_size: Option<u64>,

    /// What it will hold, which decides on the number of inodes: floppy, small, default, big, huge, news, largefile, largefile4
    #[arg(short = 'T', long)]
    usage: Option<Usage>,

    /// Where it was last mounted, for those who look at an unmounted file system
    #[arg(short = 'M', long, value_name = "PATH", default_value = "")]
    last_mounted: String,

    /// What the kernel does about damage
    #[arg(short = 'e', long, value_enum, default_value_t = ErrorsName::Continue)]
    errors: ErrorsName,
}

#[derive(Clone, Copy, Debug)]
enum Uuid {
    Random,
    This([u8; 16]),
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum TypeName {
    Ext2,
    Ext3,
    Ext4,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum ProfileName {
    /// With metadata_csum_seed and orphan_file, for kernels from 5.15 on
    #[value(name = "ubuntu-24.04")]
    Ubuntu2404,
    /// The same features
    #[value(name = "debian-13")]
    Debian13,
    /// Without those two
    #[value(name = "debian-12")]
    Debian12,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum ErrorsName {
    Continue,
    RemountRo,
    Panic,
}

impl FileSystemArguments {
    /// The options of a file system of `size` bytes made at `now`, which only the environment fixes if it is `fixed`.
    pub(crate) fn options(&self, size: u64, now: i64, fixed: bool) -> anyhow::Result<MkfsOptions> {
        let mut options = self.without_identity(now)?;
        options.uuid = match self.uuid {
            Some(Uuid::This(uuid)) => uuid,
            None if fixed => stable_uuid(format!("{now} {size} {}", self.label).as_bytes()),
            None | Some(Uuid::Random) => random_uuid()?,
        };
        Ok(options)
    }

    fn without_identity(&self, now: i64) -> anyhow::Result<MkfsOptions> {
        let mut options = MkfsOptions {
            kind: match self.kind {
                TypeName::Ext2 => Type::Ext2,
                TypeName::Ext3 => Type::Ext3,
                TypeName::Ext4 => Type::Ext4,
            },
            profile: match self.profile {
                ProfileName::Ubuntu2404 => Profile::Ubuntu2404,
                ProfileName::Debian13 => Profile::Debian13,
                ProfileName::Debian12 => Profile::Debian12,
            },
            features: self.features.clone(),
            usage: self.usage,
            block_size: self.block_size,
            inode_size: self.inode_size,
            inodes: self.inodes,
            bytes_per_inode: self.bytes_per_inode,
            blocks_per_group: self.blocks_per_group,
            groups_per_flex: self.groups_per_flex,
            reserved: match self.reserved {
                Some(bytes) => Reserved::Bytes(bytes),
                None => Reserved::Percent(self.reserved_percent),
            },
            label: self.label.as_bytes().to_vec(),
            last_mounted: self.last_mounted.as_bytes().to_vec(),
            now,
            journal_size: self.journal_size,
            errors: match self.errors {
                ErrorsName::Continue => ErrorBehaviour::Continue,
                ErrorsName::RemountRo => ErrorBehaviour::RemountReadOnly,
                ErrorsName::Panic => ErrorBehaviour::Panic,
            },
            ..MkfsOptions::default()
        };
        for word in self.extended.split(',').filter(|word| !word.is_empty()) {
            extend(&mut options, word).ok_or_else(|| {
                anyhow::anyhow!("the extended option '{word}' is unknown, or its value is wrong; see qtk mkfs --help")
            })?;
        }
        Ok(options)
    }
}

/// Takes one extended option. `None` if there is no such option, or not with this value.
fn extend(options: &mut MkfsOptions, word: &str) -> Option<()> {
    let (name, value) = word.split_once('=').unwrap_or((word, ""));
    match name {
        "stride" => options.stride = value.parse().ok()?,
        "stripe_width" | "stripe-width" => options.stripe_width = value.parse().ok()?,
        "resize" => options.resize = Some(value.parse().ok()?),
        "root_owner" => {
            let (uid, gid) = value.split_once(':')?;
            options.root_owner = (uid.parse().ok()?, gid.parse().ok()?);
        }
        "root_perms" => {
            options.root_permissions = u16::from_str_radix(value, 8).ok().filter(|&mode| mode <= 0o7777)?;
        }
        "hash_seed" => match parse_uuid(value).ok()? {
            Uuid::This(seed) => options.hash_seed = Some(seed),
            Uuid::Random => return None,
        },
        "num_backup_sb" => options.backups = value.parse().ok().filter(|&backups| backups <= 2)?,
        "orphan_file_size" => options.orphan_file_size = Some(size::parse(value).ok()?),
        "lazy_itable_init" => {
            options.lazy_inode_tables = match value {
                "" | "1" => true,
                "0" => false,
                _ => return None,
            };
        }
        _ => return None,
    }
    Some(())
}

fn parse_small<T: TryFrom<u64>>(text: &str) -> Result<T, String> {
    T::try_from(size::parse(text)?).map_err(|_| format!("'{text}' is too large"))
}

fn parse_uuid(text: &str) -> Result<Uuid, String> {
    if text == "random" {
        return Ok(Uuid::Random);
    }
    let wrong = || format!("'{text}' is no UUID, such as 8a5b1c9e-4f6d-4c3b-9a70-2f1e0d3c4b5a, and not 'random'");
    let digits: Vec<u8> = text.bytes().filter(|&byte| byte != b'-').collect();
    let mut uuid = [0; 16];
    if digits.len() != 2 * uuid.len() {
        return Err(wrong());
    }
    for (byte, pair) in uuid.iter_mut().zip(digits.chunks_exact(2)) {
        let pair = std::str::from_utf8(pair).map_err(|_| wrong())?;
        *byte = u8::from_str_radix(pair, 16).map_err(|_| wrong())?;
    }
    Ok(Uuid::This(uuid))
}

fn random_uuid() -> std::io::Result<[u8; 16]> {
    let mut uuid = [0; 16];
    std::io::Read::read_exact(&mut std::fs::File::open("/dev/urandom")?, &mut uuid)?;
    uuid[6] = uuid[6] & 0x0f | 0x40;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    Ok(uuid)
}

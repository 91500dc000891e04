use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, bail};
use clap::Args;
use qtk_block::{Access, BlockRead, BlockWrite, Window};
use qtk_disk::{Content, EditOptions, Layout, Place, Timestamp};
use qtk_ext4::Editor;
use qtk_ext4::mkfs::{self, Formatted, MkfsError, MkfsOptions};
use qtk_guest::populate::{ArchiveOptions, FolderOptions, Manifest, Populated, WriteOptions};
use qtk_image::{Format, NewImage, OpenOptions, build_image};
use serde_json::json;

use super::arguments::FormatName;
use super::mkfs_options::FileSystemArguments;
use super::{guest, size, text};

/// Make an ext2, ext3 or ext4 file system, empty or with the content of folders and archives
#[derive(Args, Debug)]
#[command(
    after_help = "The layout is that of mke2fs: equal options give equal blocks. With SOURCE_DATE_EPOCH set, or with -U and that \
    variable, the same input gives the same bytes. Times of files past SOURCE_DATE_EPOCH become it."
)]
pub(crate) struct Mkfs {
    /// The image: a new one, or one whose disk or partition gets the file system
    image: PathBuf,

    /// Size of a new image, such as 2G, or 'fit' for just enough for what goes in; 'fit' where not given
    #[arg(short, long, value_parser = parse_size)]
    size: Option<WantedSize>,

    /// Space to leave free with '--size fit'
    #[arg(long, value_name = "SIZE", value_parser = size::parse, default_value = "0")]
    free: u64,

    /// Format of a new image, raw where not given; of one that is there, found out where not given
    #[arg(long, value_name = "FORMAT")]
    format: Option<FormatName>,

    /// Partition that gets the file system
    #[arg(long, value_name = "NUMBER")]
    partition: Option<u32>,

    #[command(flatten)]
    file_system: FileSystemArguments,

    /// A folder or tar archive whose content goes in; those given later go on top
    #[arg(short = 'd', long = "root", value_name = "DIR|TAR")]
    roots: Vec<PathBuf>,

    /// A tar archive that is a layer of a container image, after all -d; names in it that begin with .wh. remove what is beneath
    #[arg(long, value_name = "TAR")]
    layer: Vec<PathBuf>,

    /// Owner of everything that goes in, in place of what is found
    #[arg(long, value_name = "UID:GID", value_parser = parse_owner)]
    owner: Option<(u32, u32)>,

    /// Overwrite what is there
    #[arg(long)]
    force: bool,

    /// Print what was made as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum WantedSize {
    Bytes(u64),
    Fit,
}

fn parse_size(text: &str) -> Result<WantedSize, String> {
    if text == "fit" { Ok(WantedSize::Fit) } else { size::parse(text).map(WantedSize::Bytes) }
}

fn parse_owner(text: &str) -> Result<(u32, u32), String> {
    let numbers = text.split_once(':').and_then(|(uid, gid)| Some((uid.parse().ok()?, gid.parse().ok()?)));
    numbers.ok_or_else(|| format!("'{text}' is no owner: write UID:GID, both as numbers"))
}

/// What goes into which file system.
struct Job {
    manifest: Option<Manifest>,
    now: Timestamp,
    fixed: bool,
}

impl Mkfs {
    pub(crate) fn run(&self) -> anyhow::Result<ExitCode> {
        let job = Job {
            manifest: self.manifest()?,
            now: guest::now()?,
            fixed: std::env::var_os("SOURCE_DATE_EPOCH").is_some(),
        };
        let exists = self.image.try_exists().with_context(|| self.image.display().to_string())?;
        let (made, populated) = if exists && (self.size.is_none() || self.partition.is_some()) {
            self.make_in_existing(&job)?
        } else {
            self.make_new(&job)?
        };
        self.report(&made, populated)?;
        Ok(ExitCode::SUCCESS)
    }

    fn manifest(&self) -> anyhow::Result<Option<Manifest>> {
        if self.roots.is_empty() && self.layer.is_empty() {
            return Ok(None);
        }
        let mut manifest = Manifest::new();
        for root in &self.roots {
            if root.is_dir() {
                manifest.add_folder(root, &FolderOptions { owner: self.owner })?;
            } else {
                manifest.add_archive(root, &ArchiveOptions { owner: self.owner, layer: false })?;
            }
        }
        for layer in &self.layer {
            manifest.add_archive(layer, &ArchiveOptions { owner: self.owner, layer: true })?;
        }
        Ok(Some(manifest))
    }

    fn make_new(&self, job: &Job) -> anyhow::Result<(Formatted, Populated)> {
        if self.partition.is_some() {
            bail!("{}: --partition is for an image that is there already", self.image.display());
        }
        super::create::refuse_existing(&self.image, self.force)?;
        let (size, options) = match (self.size, &job.manifest) {
            (Some(WantedSize::Bytes(size)), _) => (size, self.options(job, size)?),
            (None | Some(WantedSize::Fit), Some(manifest)) => self.fit(job, manifest)?,
            (_, None) => bail!("{}: say how large it is to be, with --size 2G or so", self.image.display()),
        };
        let format = self.format.map_or(Format::Raw, Format::from);
        let new = NewImage { format, size: Some(size), ..NewImage::default() };
        let options = MkfsOptions { device_is_zero: true, ..options };
        build_image(&self.image, &new, |device| self.fill(job, &device, &options))
    }

    fn make_in_existing(&self, job: &Job) -> anyhow::Result<(Formatted, Populated)> {
        let format = self.format.map(Format::from);
        let image =
            guest::open(&self.image, &OpenOptions { format, access: Access::ReadWrite, ..OpenOptions::default() })?;
        let transaction = Arc::new(image.begin()?);
        let done = (|| {
            let device = self.target(transaction.clone())?;
            let options = self.options(job, device.size())?;
            self.fill(job, &device, &options)
        })();
        let done = done.with_context(|| self.image.display().to_string())?;
        transaction.commit()?;
        Ok(done)
    }

    /// The partition, or the whole disk, once it is clear that nobody will miss what is there.
    fn target(&self, disk: Arc<dyn BlockWrite>) -> anyhow::Result<Arc<dyn BlockWrite>> {
        let readable: Arc<dyn BlockRead> = Arc::new(disk.clone());
        let layout = Layout::read(&readable)?;
        let Some(number) = self.partition else {
            if layout.table.is_some() && !self.force {
                bail!(
                    "it is divided into partitions: choose one with --partition, or overwrite all of it with --force"
                );
            }
            for slot in &layout.slots {
                self.refuse_content(slot.probe.content, slot.place)?;
            }
            return Ok(disk);
        };
        let slot = layout.slots.iter().find(|slot| slot.place == Place::Partition(number));
        let slot = slot.with_context(|| format!("there is no partition {number}"))?;
        self.refuse_content(slot.probe.content, slot.place)?;
        Ok(Arc::new(Window::new(disk, slot.range.clone())?))
    }

    fn refuse_content(&self, content: Content, place: Place) -> anyhow::Result<()> {
        if content == Content::Empty || self.force {
            return Ok(());
        }
        bail!("{place} holds {content} already: overwrite it with --force");
    }

    /// The options for a device of `size` bytes, with inodes enough for what goes in.
    fn options(&self, job: &Job, size: u64) -> anyhow::Result<MkfsOptions> {
        let mut options = self.file_system.options(size, job.now.seconds, job.fixed)?;
        if let Some(manifest) = &job.manifest
            && options.inodes.is_none()
            && options.bytes_per_inode.is_none()
        {
            let planned = mkfs::plan(size, &options)?;
            let needed = manifest.needs(planned.block_size, planned.inode_size).inodes;
            if needed > planned.free_inodes.into() {
                let used = u64::from(planned.inodes - planned.free_inodes);
                options.inodes = Some(u32::try_from(needed + used).context("there are more files than inodes")?);
            }
        }
        Ok(options)
    }

    /// The smallest size, in whole mebibytes, in which everything has room.
    fn fit(&self, job: &Job, manifest: &Manifest) -> anyhow::Result<(u64, MkfsOptions)> {
        const STEP: u64 = 1 << 20;
        let base = self.file_system.options(0, job.now.seconds, job.fixed)?;
        let block_size = base.block_size.unwrap_or(4096);
        let needs = manifest.needs(block_size, base.inode_size.unwrap_or(256));
        let wanted = needs.blocks + self.free.div_ceil(block_size.into());
        let mut size = (wanted * u64::from(block_size)).next_multiple_of(STEP).max(STEP);
        loop {
            let fixed_block = |options| MkfsOptions { block_size: Some(block_size), ..options };
            let planned = match self.options(job, size).map(fixed_block) {
                Ok(options) => mkfs::plan(size, &options).map(|planned| (planned, options)),
                Err(error) => Err(error.downcast::<MkfsError>()?),
            };
            let missing = match planned {
                Ok((planned, options)) => {
                    let missing = (wanted + planned.reserved_blocks).saturating_sub(planned.free_blocks);
                    if missing == 0 {
                        return Ok((size, options));
                    }
                    missing * u64::from(block_size)
                }
                Err(MkfsError::TooSmall) => STEP,
                Err(error) => return Err(error.into()),
            };
            size = (size + missing).next_multiple_of(STEP);
        }
    }

    fn fill(
        &self,
        job: &Job,
        device: &Arc<dyn BlockWrite>,
        options: &MkfsOptions,
    ) -> anyhow::Result<(Formatted, Populated)> {
        let made = mkfs::format(&**device, options)?;
        let Some(manifest) = &job.manifest else { return Ok((made, Populated::default())) };
        let mut editor = Editor::open(device.clone(), EditOptions::new(job.now))?;
        let write = WriteOptions { latest: job.fixed.then_some(job.now) };
        let populated = manifest.write(&mut editor, &**device, &write)?;
        editor.commit()?;
        let fs = editor.fs();
        let mut made = made;
        (made.free_blocks, made.free_inodes) = (fs.free_blocks(), fs.free_inodes());
        Ok((made, populated))
    }

    fn report(&self, made: &Formatted, populated: Populated) -> anyhow::Result<()> {
        let block_size = u64::from(made.block_size);
        if made.journal_left_out {
            text::warn(&format!("{}: too small for a journal, which was left out", self.image.display()));
        }
        if self.json {
            return text::print_json(&json!({
                "image": self.image.display().to_string(),
                "block-size": made.block_size,
                "blocks": made.blocks,
                "free-blocks": made.free_blocks,
                "reserved-blocks": made.reserved_blocks,
                "inodes": made.inodes,
                "free-inodes": made.free_inodes,
                "inode-size": made.inode_size,
                "journal": made.has_journal,
                "files": populated.files,
                "bytes": populated.bytes,
            }));
        }
        writeln!(
            io::stdout().lock(),
            "{}: {} in blocks of {}, {} free; {} inodes, {} free",
            self.image.display(),
            size::human(made.blocks * block_size),
            made.block_size,
            size::human(made.free_blocks * block_size),
            made.inodes,
            made.free_inodes,
        )?;
        Ok(())
    }
}

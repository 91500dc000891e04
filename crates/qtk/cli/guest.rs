//! Opening the guest's tree inside an image, for a look or for an edit.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context;
use clap::Args;
use qtk_block::Access;
use qtk_disk::{EditOptions, Timestamp, Tree};
use qtk_image::{Format, Image, OpenOptions};

use super::arguments::FormatName;
use super::text;

/// Where a guest lies. The format has no short option here: with verbs named after coreutils, `-f` forces.
#[derive(Args, Debug)]
struct GuestImage {
    /// The disk image
    image: PathBuf,

    /// Format of the image; found out where it is not given
    #[arg(long, value_name = "FORMAT")]
    image_format: Option<FormatName>,

    /// Partition that holds the guest's root; found by its content where it is not given
    #[arg(long, value_name = "NUMBER")]
    partition: Option<u32>,
}

impl GuestImage {
    fn open(&self, access: Access, share: bool) -> anyhow::Result<Image> {
        let format = self.image_format.map(Format::from);
        open(&self.image, &OpenOptions { format, share, access, ..OpenOptions::default() })
    }

    /// Puts the image's name before an error, which itself only knows paths inside the guest.
    fn name_errors<T>(&self, work: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
        work().with_context(|| self.image.display().to_string())
    }

    fn warn(&self, tree: &Tree) {
        for warning in tree.warnings() {
            text::warn(&format!("{}: {warning}", self.image.display()));
        }
    }
}

/// The image whose guest a verb looks into.
#[derive(Args, Debug)]
pub(crate) struct GuestToRead {
    #[command(flatten)]
    guest: GuestImage,

    /// Read without locking, even while a VM writes the image. What is read may then be inconsistent
    #[arg(short = 'U', long)]
    force_share: bool,
}

impl GuestToRead {
    /// The guest's tree.
    pub(crate) fn open(&self) -> anyhow::Result<Tree> {
        let image = self.guest.open(Access::ReadOnly, self.force_share)?;
        let tree = self.name_errors(|| Ok(Tree::open(Arc::new(image), self.guest.partition)?))?;
        self.guest.warn(&tree);
        Ok(tree)
    }

    /// Puts the image's name before an error of work on its tree.
    pub(crate) fn name_errors<T>(&self, work: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
        self.guest.name_errors(work)
    }
}

/// The image whose guest a verb edits.
#[derive(Args, Debug)]
pub(crate) struct GuestToEdit {
    #[command(flatten)]
    guest: GuestImage,
}

impl GuestToEdit {
    /// Runs `edit` on the guest's tree in one transaction: all of it is on disk when this returns, or none of it.
    pub(crate) fn edit<T>(&self, edit: impl FnOnce(&mut Tree) -> anyhow::Result<T>) -> anyhow::Result<T> {
        let transaction = Arc::new(self.guest.open(Access::ReadWrite, false)?.begin()?);
        let options = EditOptions::new(now()?);
        let result = self.guest.name_errors(|| {
            let mut tree = Tree::open_rw(Arc::clone(&transaction) as _, self.guest.partition, options)?;
            self.guest.warn(&tree);
            let result = edit(&mut tree)?;
            tree.commit()?;
            Ok(result)
        })?;
        transaction.commit()?;
        Ok(result)
    }
}

/// Opens an image and says on standard error what deserves a warning.
pub(crate) fn open(path: &std::path::Path, options: &OpenOptions) -> anyhow::Result<Image> {
    let image = Image::open(path, options)?;
    for warning in image.warnings() {
        text::warn(&warning.to_string());
    }
    Ok(image)
}

/// The time that edits carry: `SOURCE_DATE_EPOCH` where it is set, for reproducible images.
pub(crate) fn now() -> anyhow::Result<Timestamp> {
    match std::env::var("SOURCE_DATE_EPOCH") {
        Ok(text) => {
            let seconds = text
                .trim()
                .parse()
                .with_context(|| format!("SOURCE_DATE_EPOCH is '{text}', not a number of seconds"))?;
            Ok(Timestamp { seconds, nanos: 0 })
        }
        Err(_) => {
            let elapsed = SystemTime::now().duration_since(UNIX_EPOCH).context("the host's clock is before 1970")?;
            Ok(Timestamp { seconds: i64::try_from(elapsed.as_secs())?, nanos: elapsed.subsec_nanos() })
        }
    }
}

//! Opening the guest's tree inside an image, for a look or for an edit.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, bail};
use clap::Args;
use qtk_block::Access;
use qtk_disk::{EditOptions, Timestamp, Tree};
use qtk_image::{Image, OpenOptions};

use super::arguments::AccessArguments;
use super::text;

/// The image whose guest a verb looks into or edits.
#[derive(Args, Debug)]
pub(crate) struct GuestArguments {
    /// The disk image
    pub(crate) image: PathBuf,

    #[command(flatten)]
    pub(crate) access: AccessArguments,

    /// Partition that holds the guest's root; found by its content where it is not given
    #[arg(long, value_name = "NUMBER")]
    partition: Option<u32>,
}

impl GuestArguments {
    /// The guest's tree, for reading.
    pub(crate) fn read(&self) -> anyhow::Result<Tree> {
        let image = open(&self.image, &self.access.for_reading())?;
        let tree = Tree::open(Arc::new(image), self.partition).with_context(|| self.name())?;
        self.warn(&tree);
        Ok(tree)
    }

    /// Puts the image's name before an error, which itself only knows paths inside the guest.
    pub(crate) fn name_errors<T>(&self, work: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
        work().with_context(|| self.name())
    }

    /// Runs `edit` on the guest's tree in one transaction: all of it is on disk when this returns, or none of it.
    pub(crate) fn edit<T>(&self, edit: impl FnOnce(&mut Tree) -> anyhow::Result<T>) -> anyhow::Result<T> {
        if self.access.force_share {
            bail!("--force-share is for reading only: shut the VM down to change its image");
        }
        let options = OpenOptions { access: Access::ReadWrite, ..self.access.for_reading() };
        let transaction = Arc::new(open(&self.image, &options)?.begin()?);
        let mut tree = Tree::open_rw(Arc::clone(&transaction) as _, self.partition, EditOptions::new(now()?))
            .with_context(|| self.name())?;
        self.warn(&tree);
        let result = self.name_errors(|| {
            let result = edit(&mut tree)?;
            tree.commit()?;
            Ok(result)
        })?;
        transaction.commit()?;
        Ok(result)
    }

    fn name(&self) -> String {
        self.image.display().to_string()
    }

    fn warn(&self, tree: &Tree) {
        for warning in tree.warnings() {
            text::warn(&format!("{}: {warning}", self.name()));
        }
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
fn now() -> anyhow::Result<Timestamp> {
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

//! What copies leave out because no guest needs it.

use std::io::{self, Write};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use clap::Args;
use qtk_block::BlockRead;
use qtk_disk::{Needed, Place, Unused, UnusedOfVolume};
use qtk_image::{ConvertReport, Image, JoinedDisk};
use serde_json::{Value, json};

use super::{size, text};

/// Whether to leave out what no guest needs.
#[derive(Args, Debug)]
pub(crate) struct SparsifyArguments {
    /// Leave out free blocks of ext2, ext3 and ext4 and the content of swap spaces. Not for the disk of a VM that is to go on
    /// from a snapshot of its memory
    #[arg(long, conflicts_with = "force_share")]
    sparsify: bool,
}

/// What was found, and the disk that it was found on: held, so that it stays true.
pub(crate) struct Sparsified(Option<(Unused, Arc<dyn BlockRead>)>);

impl SparsifyArguments {
    /// Looks at the disk that `sources` make up, and says on standard error what had to be left as it is.
    pub(crate) fn find(&self, sources: &[Image]) -> anyhow::Result<Sparsified> {
        if !self.sparsify {
            return Ok(Sparsified(None));
        }
        let disk: Arc<dyn BlockRead> = Arc::new(JoinedDisk::new(sources)?);
        let unused = Unused::find(&disk);
        let name = sources.first().map_or(Path::new(""), Image::path).display();
        for UnusedOfVolume { place, unused, .. } in &unused.volumes {
            if let Err(needed) = unused
                && !matches!(needed, Needed::Foreign)
            {
                text::warn(&format!("{name}: {place} is copied with all that is free in it: {needed}"));
            }
        }
        if unused.volumes.iter().all(|volume| matches!(volume.unused, Err(Needed::Foreign))) {
            text::warn(&format!("{name}: neither an ext file system nor a swap space was found; everything is copied"));
        }
        Ok(Sparsified(Some((unused, disk))))
    }
}

impl Sparsified {
    /// Says how much was left out, if that was asked for.
    pub(crate) fn print(&self, report: &ConvertReport) -> anyhow::Result<()> {
        match self.0 {
            Some(_) => Ok(writeln!(io::stdout(), "left out {} that no guest needs", size::human(report.left_out))?),
            None => Ok(()),
        }
    }

    pub(crate) fn ranges(&self) -> Vec<Range<u64>> {
        self.0.as_ref().map_or_else(Vec::new, |(unused, _)| unused.ranges.clone())
    }

    /// Adds to what a copy did, for `--json`, what was left out of which volume.
    pub(crate) fn describe(&self, report: &ConvertReport, facts: &mut Value) {
        if let Some((unused, _)) = &self.0 {
            facts["left-out-bytes"] = report.left_out.into();
            facts["volumes"] = unused.volumes.iter().map(volume_to_json).collect();
        }
    }
}

fn volume_to_json(volume: &UnusedOfVolume) -> Value {
    let partition = match volume.place {
        Place::Partition(number) => Some(number),
        _ => None,
    };
    let mut facts = json!({ "partition": partition, "content": volume.content.to_string() });
    match &volume.unused {
        Ok(bytes) => facts["unused-bytes"] = (*bytes).into(),
        Err(needed) => facts["kept-because"] = needed.to_string().into(),
    }
    facts
}

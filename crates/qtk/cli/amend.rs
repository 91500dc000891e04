use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use qtk_qcow2::Amend;

use super::new_image::Compat;
use super::snapshot::change;

/// Change features of a qcow2 image
#[derive(Args, Debug)]
#[command(after_help = "To change the size use `qtk resize`, to change the backing file `qtk rebase`.")]
pub(crate) struct AmendVerb {
    /// The qcow2 image
    image: PathBuf,

    /// Version of qcow2; what the other version cannot say is converted, or refused
    #[arg(long, value_enum)]
    compat: Option<Compat>,

    /// Width of a refcount in bits: 1, 2, 4, 8, 16, 32 or 64
    #[arg(long, value_name = "BITS")]
    refcount_bits: Option<u32>,

    /// Whether QEMU may postpone refcount updates
    #[arg(long, value_name = "BOOL")]
    lazy_refcounts: Option<bool>,

    /// Name of the external data file, which the image must have
    #[arg(long, value_name = "FILE")]
    data_file: Option<String>,

    /// Whether the data file stays a raw image of the disk; that can only be given up
    #[arg(long, value_name = "BOOL")]
    data_file_raw: Option<bool>,
}

impl AmendVerb {
    pub(crate) fn run(&self) -> anyhow::Result<ExitCode> {
        let amend = Amend {
            version: self.compat.map(Into::into),
            refcount_bits: self.refcount_bits,
            lazy_refcounts: self.lazy_refcounts,
            data_file: self.data_file.clone().map(Some),
            data_file_raw: self.data_file_raw,
            ..Amend::default()
        };
        change(&self.image, |transaction| transaction.amend(&amend))?;
        Ok(ExitCode::SUCCESS)
    }
}

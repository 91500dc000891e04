use std::io;
use std::ops::Range;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use qtk_block::{Access, BlockRead, Extent, HostStorage};

use crate::layer::Depth;
use crate::open::{self, OpenOptions, Warning};
use crate::{Chain, ChainLayer, Error, Format, NodeSpec, Runs, Transaction};

/// An image with everything it lies on, locked as QEMU would lock it. Reads as the guest sees its disk.
#[derive(Debug)]
pub struct Image {
    path: PathBuf,
    chain: Chain,
    warnings: Vec<Warning>,
    access: Access,
}

impl Image {
    /// Opens the image at `path` and its chain of backing files.
    pub fn open(path: impl AsRef<Path>, options: &OpenOptions) -> Result<Self, Error> {
        let path = path.as_ref();
        Self::open_node(&open::spec_of(path)?, options)
    }

    /// Opens the image that `spec` describes and its chain of backing files.
    pub fn open_node(spec: &NodeSpec, options: &OpenOptions) -> Result<Self, Error> {
        let (chain, warnings) = open::open_chain(spec.clone(), options, None)?;
        Ok(Self { warnings, ..Self::of_chain(chain, options.access) })
    }

    /// An open chain as an image.
    pub(crate) fn of_chain(chain: Chain, access: Access) -> Self {
        let path = chain.named().map_or_else(PathBuf::new, |layer| layer.path().to_owned());
        Self { path, chain, warnings: Vec::new(), access }
    }

    /// Opens the file at `path` alone, whatever it lies on: for looking at its metadata.
    pub fn open_layer(path: impl AsRef<Path>, options: &OpenOptions) -> Result<ChainLayer, Error> {
        Self::open_node_layer(&open::spec_of(path.as_ref())?, options)
    }

    /// Opens the node that `spec` describes alone, without external data file: for looking at its metadata.
    pub fn open_node_layer(spec: &NodeSpec, options: &OpenOptions) -> Result<ChainLayer, Error> {
        open::open_layer(spec.clone(), options, Depth::Metadata)
    }

    /// The same with its external data file: for what concerns the image alone, whatever it lies on.
    pub fn open_node_alone(spec: &NodeSpec, options: &OpenOptions) -> Result<ChainLayer, Error> {
        open::open_layer(spec.clone(), options, Depth::Image)
    }

    /// Begins to change the image, which must have been opened for writing. Its locks are held until the transaction is
    /// dropped; to see the new state as an image, open it again.
    pub fn begin(self) -> Result<Transaction, Error> {
        Transaction::begin(self)
    }

    /// What the disk lies in, if that is a block device, which is written in place: for it there are no transactions.
    pub(crate) fn in_place(&self) -> Result<Option<Arc<dyn HostStorage>>, Error> {
        let Some(layer) = self.chain.named().filter(|layer| layer.format() == Format::Raw) else { return Ok(None) };
        let metadata = layer.file().file().metadata().map_err(Error::io(&self.path, "look at it"))?;
        Ok(metadata.file_type().is_block_device().then(|| layer.storage()))
    }

    pub(crate) fn access(&self) -> Access {
        self.access
    }

    /// The name that the image was opened by.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The format of the file at [`path`](Self::path).
    #[must_use]
    pub fn format(&self) -> Format {
        self.chain.named().map_or(Format::Raw, ChainLayer::format)
    }

    /// The files of the chain, topmost first.
    #[must_use]
    pub fn layers(&self) -> &[ChainLayer] {
        self.chain.layers()
    }

    /// The chain as a device that can be kept when the image is gone.
    #[must_use]
    pub fn chain(&self) -> &Chain {
        &self.chain
    }

    /// What the user should be told.
    #[must_use]
    pub fn warnings(&self) -> &[Warning] {
        &self.warnings
    }

    /// How the chain stores `range`, which must lie on the disk, run by run.
    #[must_use]
    pub fn runs(&self, range: Range<u64>) -> Runs<'_> {
        self.chain.runs(range)
    }
}

impl BlockRead for Image {
    fn size(&self) -> u64 {
        self.chain.size()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.chain.read_at(buf, offset)
    }

    fn extent(&self, range: Range<u64>) -> io::Result<Extent> {
        self.chain.extent(range)
    }
}

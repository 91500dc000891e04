//! Changing an image's metadata: open, lock, one transaction.

use std::io;
use std::sync::Arc;

use qtk_block::{Access, BlockRead};

use crate::{ChainLayer, Error, Image, NodeSpec, OpenOptions};

fn for_writing(options: &OpenOptions) -> OpenOptions {
    OpenOptions { access: Access::ReadWrite, ..options.clone() }
}

/// Changes the qcow2 image that `spec` describes, with its chain open, in one transaction: snapshots, bitmaps, features.
pub fn edit<T>(
    spec: &NodeSpec,
    options: &OpenOptions,
    change: impl FnOnce(&qtk_qcow2::Transaction, &Image) -> Result<T, Error>,
) -> Result<T, Error> {
    let image = Image::open_node(spec, &for_writing(options))?;
    edit_open(&image, |transaction| change(transaction, &image))
}

/// The same for an image that is open for writing already.
pub fn edit_open<T>(
    image: &Image,
    change: impl FnOnce(&qtk_qcow2::Transaction) -> Result<T, Error>,
) -> Result<T, Error> {
    let beneath = image.chain().beneath().map(|beneath| Arc::new(beneath) as Arc<dyn BlockRead>);
    let transaction = begin(image.chain().named(), beneath)?;
    let result = change(&transaction)?;
    transaction.commit_settled()?;
    Ok(result)
}

/// The same for what concerns the image alone: what it lies on is not open, and need not exist.
pub fn edit_alone<T>(
    layer: &ChainLayer,
    change: impl FnOnce(&qtk_qcow2::Transaction) -> Result<T, Error>,
) -> Result<T, Error> {
    let beneath = layer.backing_name().map(|_| Arc::new(Unopened { size: layer.size() }) as Arc<dyn BlockRead>);
    let transaction = begin(Some(layer), beneath)?;
    let result = change(&transaction)?;
    transaction.commit_settled()?;
    Ok(result)
}

fn begin(layer: Option<&ChainLayer>, beneath: Option<Arc<dyn BlockRead>>) -> Result<qtk_qcow2::Transaction, Error> {
    match layer.map(|layer| (layer, layer.qcow2())) {
        Some((_, Some(qcow2))) => Ok(qtk_qcow2::Transaction::begin(qcow2.clone(), beneath)?),
        Some((layer, None)) => Err(Error::NotQcow2 { path: layer.path().to_owned() }),
        None => Err(Error::NotQcow2 { path: std::path::PathBuf::new() }),
    }
}

/// What an image lies on, where that does not matter.
#[derive(Debug)]
struct Unopened {
    size: u64,
}

impl BlockRead for Unopened {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, _buf: &mut [u8], _offset: u64) -> io::Result<()> {
        Err(io::Error::other("the backing file was not opened"))
    }
}

//! New images whose content is made in place rather than copied.

use std::path::Path;
use std::sync::Arc;

use qtk_block::{BlockWrite, HostStorage, OutputFile};
use qtk_qcow2::{CreateOptions, ImageWriter, Layer, Transaction};

use crate::convert::refuse_used;
use crate::create::Prepared;
use crate::{Error, Format, NewImage};

/// Makes an image at `path` that holds what `fill` writes to its disk, which reads as zeroes at first. The image appears when
/// it is complete; what was there is replaced. It stands alone, in one file.
pub fn build_image<T, E: From<Error>>(
    path: &Path,
    new: &NewImage,
    fill: impl FnOnce(Arc<dyn BlockWrite>) -> Result<T, E>,
) -> Result<T, E> {
    let Prepared { options, base } = new.prepare(path, None)?;
    if base.is_some() || options.data_file.is_some() {
        let problem = "an image that is built has neither a base nor a data file".to_owned();
        return Err(Error::Invalid { path: path.to_owned(), problem }.into());
    }
    let _lock = refuse_used(path)?;
    let output = OutputFile::create(path, new.durability).map_err(Error::io(path, "create it"))?;
    let result = match new.format {
        Format::Raw => {
            output.storage().set_size(options.size).map_err(Error::io(path, "set its size"))?;
            fill(output.storage().clone())?
        }
        Format::Qcow2 => fill_qcow2(path, &output, options, fill)?,
    };
    output.commit().map_err(Error::io(path, "put it in its place"))?;
    Ok(result)
}

fn fill_qcow2<T, E: From<Error>>(
    path: &Path,
    output: &OutputFile,
    options: CreateOptions,
    fill: impl FnOnce(Arc<dyn BlockWrite>) -> Result<T, E>,
) -> Result<T, E> {
    let name = path.to_string_lossy();
    let begin = || -> Result<Transaction, qtk_qcow2::Error> {
        ImageWriter::new_with(output.storage().clone(), None, &name, options)?.finish()?;
        Transaction::begin(Arc::new(Layer::open(output.storage().clone(), name.clone())?), None)
    };
    let transaction = Arc::new(begin().map_err(Error::from)?);
    let result = fill(transaction.clone())?;
    transaction.commit_settled().map_err(Error::from)?;
    Ok(result)
}

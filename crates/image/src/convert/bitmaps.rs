use std::path::Path;
use std::sync::Arc;

use qtk_block::{BlockRead, HostStorage, RawFile};
use qtk_qcow2::{BitmapContents, Layer, NewBitmap, Transaction};

use crate::{Chain, ChainLayer, Error, Image};

use super::{BitmapCopy, ConvertWarning};

/// The persistent dirty bitmaps that a copy gets.
#[derive(Debug, Default)]
pub(crate) struct CopiedBitmaps(Vec<(NewBitmap, BitmapContents)>);

impl CopiedBitmaps {
    /// Those of the first source's topmost file, as far as they are wanted.
    pub(crate) fn of(
        sources: &[Image],
        wanted: BitmapCopy,
        warn: &mut dyn FnMut(ConvertWarning),
    ) -> Result<Self, Error> {
        let layer = sources.first().and_then(|image| image.layers().iter().find(|layer| !layer.is_log()));
        let Some(layer) = layer.and_then(ChainLayer::qcow2).filter(|_| wanted != BitmapCopy::None) else {
            return Ok(Self::default());
        };
        let mut copied = Vec::new();
        for bitmap in layer.bitmaps()? {
            match wanted {
                _ if !bitmap.in_use => {
                    let contents = layer.bitmap_contents(&bitmap.name)?;
                    let (granularity, enabled) = (Some(bitmap.granularity), bitmap.auto);
                    copied.push((NewBitmap { name: bitmap.name, granularity, enabled }, contents));
                }
                BitmapCopy::Consistent => warn(ConvertWarning::BrokenBitmap { name: bitmap.name }),
                BitmapCopy::None | BitmapCopy::All => {
                    return Err(Error::BrokenBitmap { image: layer.name().into(), name: bitmap.name });
                }
            }
        }
        Ok(Self(copied))
    }

    pub(crate) fn add_to(&self, target: &Transaction) -> Result<(), Error> {
        for (bitmap, contents) in &self.0 {
            target.add_bitmap(bitmap)?;
            target.merge_bitmap(&bitmap.name, contents)?;
        }
        Ok(())
    }

    /// Adds them to a new image that lies on `base`.
    pub(crate) fn add_to_new(
        &self,
        path: &Path,
        (file, data): (Arc<RawFile>, Option<Arc<RawFile>>),
        base: Option<&Chain>,
    ) -> Result<(), Error> {
        if self.0.is_empty() {
            return Ok(());
        }
        let data = data.map(|data| data as Arc<dyn HostStorage>);
        let layer = Arc::new(Layer::open_with(file, path.to_string_lossy(), data)?);
        let target = Transaction::begin(layer, base.map(|base| Arc::new(base.clone()) as Arc<dyn BlockRead>))?;
        self.add_to(&target)?;
        Ok(target.commit_settled()?)
    }
}

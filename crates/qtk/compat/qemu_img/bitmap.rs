use std::ffi::{OsStr, OsString};
use std::process::ExitCode;

use qtk_block::Access;
use qtk_image::{ChainLayer, Error, edit_alone};
use qtk_qcow2::{BitmapContents, BitmapRefusal, NewBitmap, Transaction};

use super::getopt::Options;
use super::message::Failure;
use super::open::ImageArguments;
use super::{Outcome, help, size};

const OPTIONS: &str = "b|source-file: f: F|source-format: g|granularity: h|help object: image-opts add remove clear enable \
                       disable merge:";

/// What QEMU would call the image; it makes up another number each time.
const NODE: &str = "#block100";

enum Action {
    Add,
    Remove,
    Clear,
    Enable,
    Disable,
    Merge(String),
}

impl Action {
    fn name(&self) -> &'static str {
        match self {
            Self::Add => "add",
            Self::Remove => "remove",
            Self::Clear => "clear",
            Self::Enable => "enable",
            Self::Disable => "disable",
            Self::Merge(_) => "merge",
        }
    }
}

#[derive(Default)]
struct Request {
    image: ImageArguments,
    actions: Vec<Action>,
    granularity: Option<u64>,
    source: Option<OsString>,
    source_format: Option<String>,
}

pub(crate) fn run(arguments: Vec<OsString>) -> Outcome {
    let mut options = Options::new(arguments, OPTIONS);
    let mut request = Request::default();
    while let Some(found) = options.next()? {
        match found.name {
            "h" => return help::print(),
            "add" => request.actions.push(Action::Add),
            "remove" => request.actions.push(Action::Remove),
            "clear" => request.actions.push(Action::Clear),
            "enable" => request.actions.push(Action::Enable),
            "disable" => request.actions.push(Action::Disable),
            "merge" => request.actions.push(Action::Merge(found.text()?)),
            "g" => request.granularity = Some(size::argument(&found.text()?, "granularity")?),
            "b" => request.source = Some(found.value),
            "F" => request.source_format = Some(found.text()?),
            _ => request.image.take(found)?,
        }
    }
    request.check()?;
    let expected = || Failure::new("Expecting filename and bitmap name");
    let [name, bitmap] = options.operands().try_into().map_err(|_| expected())?;
    request.check_sources()?;
    request.run(&name, &bitmap.to_string_lossy())
}

impl Request {
    fn check(&self) -> Result<(), Failure> {
        match self.actions.is_empty() {
            false => Ok(()),
            true => Err(Failure::new("Need at least one of --add, --remove, --clear, --enable, --disable, or --merge")),
        }
    }

    fn check_sources(&self) -> Result<(), Failure> {
        let does = |wanted: fn(&Action) -> bool| self.actions.iter().any(wanted);
        if self.granularity.is_some_and(|granularity| granularity > 0) && !does(|action| matches!(action, Action::Add))
        {
            return Err(Failure::new("granularity only supported with --add"));
        }
        if self.source.is_some() && !does(|action| matches!(action, Action::Merge(_))) {
            return Err(Failure::new("Merge bitmap source file only supported with --merge"));
        }
        if self.source.is_none() && self.source_format.is_some() {
            return Err(Failure::new("-F only supported with -b"));
        }
        Ok(())
    }

    /// Does all of the actions, or none.
    fn run(&self, name: &OsStr, bitmap: &str) -> Outcome {
        let layer = self.image.open_alone(name, Access::ReadWrite)?;
        let source = ImageArguments { format: self.source_format.clone(), ..ImageArguments::default() };
        let source = self.source.as_deref().map(|name| source.open_alone(name, Access::ReadOnly)).transpose()?;
        let mut current = None;
        let result = edit_alone(&layer, |transaction| {
            self.actions.iter().try_for_each(|action| {
                current = Some(action);
                self.act(transaction, action, bitmap, source.as_ref())
            })
        });
        match (result, current.or(self.actions.first())) {
            (Ok(()), _) => Ok(ExitCode::SUCCESS),
            (Err(error), Some(action)) => {
                let failure = in_words(error, action, bitmap);
                Err(failure.prefix(format_args!("Operation {} on bitmap {bitmap} failed: ", action.name())))
            }
            (Err(error), None) => Err(error.into()),
        }
    }

    fn act(
        &self,
        transaction: &Transaction,
        action: &Action,
        bitmap: &str,
        source: Option<&ChainLayer>,
    ) -> Result<(), Error> {
        match action {
            Action::Add => {
                let granularity = self.granularity.filter(|&granularity| granularity > 0);
                transaction.add_bitmap(&NewBitmap { name: bitmap.to_owned(), granularity, enabled: true })?;
            }
            Action::Remove => transaction.remove_bitmap(bitmap)?,
            Action::Clear => transaction.clear_bitmap(bitmap)?,
            Action::Enable => transaction.enable_bitmap(bitmap)?,
            Action::Disable => transaction.disable_bitmap(bitmap)?,
            Action::Merge(from) => {
                // The one that is merged into is missed first.
                transaction.bitmap_contents(bitmap)?;
                let contents = match source {
                    None => transaction.bitmap_contents(from)?,
                    Some(layer) => contents(layer, from)?,
                };
                transaction.merge_bitmap(bitmap, &contents)?;
            }
        }
        Ok(())
    }
}

fn contents(layer: &ChainLayer, bitmap: &str) -> Result<BitmapContents, Error> {
    let not_found = || qtk_qcow2::Error::Bitmap {
        image: layer.filename().to_owned(),
        bitmap: bitmap.to_owned(),
        refusal: BitmapRefusal::NotFound,
    };
    Ok(layer.qcow2().ok_or_else(not_found)?.bitmap_contents(bitmap)?)
}

fn in_words(error: Error, action: &Action, bitmap: &str) -> Failure {
    match error {
        Error::Qcow2(qtk_qcow2::Error::Bitmap { bitmap, refusal, .. }) => refused(&bitmap, &refusal),
        Error::NotQcow2 { .. } if matches!(action, Action::Add) => {
            Failure::new(format!("Can't store persistent bitmaps to {NODE}: Operation not supported"))
        }
        Error::NotQcow2 { .. } => refused(bitmap, &BitmapRefusal::NotFound),
        other => other.into(),
    }
}

pub(crate) fn refused(bitmap: &str, refusal: &BitmapRefusal) -> Failure {
    let not_persistent = |why: &str| format!("Can't make bitmap '{bitmap}' persistent in '{NODE}': {why}");
    Failure::new(match refusal {
        BitmapRefusal::NotFound => format!("Dirty bitmap '{bitmap}' not found"),
        BitmapRefusal::Exists => format!("Bitmap already exists: {bitmap}"),
        BitmapRefusal::EmptyName => "Bitmap name cannot be empty".to_owned(),
        BitmapRefusal::NameTooLong { max } => {
            not_persistent(&format!("Name length exceeds maximum ({max} characters)"))
        }
        BitmapRefusal::Granularity(_) => "Granularity must be power of 2 and at least 512".to_owned(),
        BitmapRefusal::Version2 => not_persistent("Cannot store dirty bitmaps in qcow2 v2 files"),
        BitmapRefusal::Inconsistent => {
            return Failure::new(format!("Bitmap '{bitmap}' is inconsistent and cannot be used"))
                .hint("Try block-dirty-bitmap-remove to delete this bitmap from disk");
        }
        BitmapRefusal::DifferentSizes { destination, source_size } => format!(
            "Bitmaps are of different sizes (destination size is {destination}, source size is {source_size}) and can't be \
             merged"
        ),
        BitmapRefusal::TooMany => not_persistent("Maximum number of persistent bitmaps is already reached"),
        other => other.to_string(),
    })
}

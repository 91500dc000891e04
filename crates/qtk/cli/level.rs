//! How strongly to compress.

use std::str::FromStr;

use clap::error::ErrorKind;
use clap::{Args, CommandFactory};
use qtk_qcow2::{CompressionType, codec};

use super::size;

/// What a level chosen by rate spends where nothing else is asked for.
const DEFAULT_RATE: u64 = 100 << 20;

#[derive(Args, Debug)]
pub(crate) struct LevelArguments {
    /// Level of the codec: zlib 1 to 12, zstd -7 to 22; with `auto` the strongest that keeps up the target rate. Where not
    /// given, the fastest that writes no more than qemu-img. A build with pure-Rust codecs has zlib 2 to 9
    #[arg(long, value_name = "N|auto", allow_negative_numbers = true, requires = "codec")]
    level: Option<Level>,

    /// With `--level auto`: bytes of the disk that each thread is to compress in a second; 100M where not given. The level comes
    /// from a fixed table, measured once on one machine, so that the result is the same on any
    #[arg(long, value_name = "SIZE", value_parser = size::parse, requires = "level")]
    target_rate: Option<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Level {
    Number(i32),
    Auto,
}

impl FromStr for Level {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "auto" => Ok(Self::Auto),
            number => number.parse().map(Self::Number).map_err(|_| "neither a whole number nor `auto`"),
        }
    }
}

impl LevelArguments {
    /// The level for a codec. Ends the process where a rate came with a numbered level.
    pub(crate) fn level(&self, kind: CompressionType) -> i32 {
        match (self.level, self.target_rate) {
            (None, _) => codec::levels(kind).1,
            (Some(Level::Auto), rate) => codec::level_for_rate(kind, rate.unwrap_or(DEFAULT_RATE)),
            (Some(Level::Number(level)), None) => level,
            (Some(Level::Number(_)), Some(_)) => super::Arguments::command()
                .error(ErrorKind::ArgumentConflict, "--target-rate chooses a level and needs '--level auto'")
                .exit(),
        }
    }
}

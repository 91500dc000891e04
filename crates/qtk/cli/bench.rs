use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use qtk_block::Access;
use qtk_image::{BenchOptions, OpenOptions, bench};
use serde_json::json;

use super::arguments::AccessArguments;
use super::{guest, size, text};

/// Time requests to an image
#[derive(Args, Debug)]
#[command(
    after_help = "Requests that reach the disk's end start over. Writes destroy what the image holds; they are one transaction."
)]
pub(crate) struct Bench {
    /// The image
    image: PathBuf,

    #[command(flatten)]
    access: AccessArguments,

    /// Number of requests
    #[arg(short, long, default_value_t = 75_000)]
    count: u64,

    /// Requests under way at a time
    #[arg(short, long, default_value_t = 64)]
    depth: usize,

    /// Bytes of a request
    #[arg(short = 's', long, value_name = "SIZE", value_parser = size::parse, default_value = "4K")]
    request_size: u64,

    /// Bytes from the start of one request to that of the next; the request's where not given
    #[arg(short = 'S', long, value_name = "SIZE", value_parser = size::parse)]
    step: Option<u64>,

    /// Where the first request begins
    #[arg(short, long, value_parser = size::parse, default_value = "0")]
    offset: u64,

    /// Write bytes of this value instead of reading
    #[arg(short, long, value_name = "BYTE")]
    write: Option<u8>,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Bench {
    pub(crate) fn run(&self) -> anyhow::Result<ExitCode> {
        let access = if self.write.is_some() { Access::ReadWrite } else { Access::ReadOnly };
        let image = guest::open(&self.image, &OpenOptions { access, ..self.access.for_reading() })?;
        let options = BenchOptions {
            count: self.count,
            depth: self.depth,
            buffer_size: self.request_size,
            step: self.step.unwrap_or(self.request_size),
            offset: self.offset,
            write: self.write,
        };
        let seconds = bench(image, &options)?.as_secs_f64();
        if self.json {
            text::print_json(
                &json!({ "requests": self.count, "request-size": self.request_size, "seconds": seconds }),
            )?;
        } else {
            writeln!(io::stdout(), "{} requests of {} in {seconds:.3} s", self.count, size::human(self.request_size))?;
        }
        Ok(ExitCode::SUCCESS)
    }
}

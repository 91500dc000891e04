//! Rates of the parts that whole commands are made of. `cargo bench`; `benches/peers.sh` measures the commands, and
//! `benches/peers/` other libraries.

mod chain;
mod check;
mod codec;
mod guest;
mod images;

use criterion::{criterion_group, criterion_main};

criterion_group!(benches, codec::benches, chain::benches, check::benches, guest::benches);
criterion_main!(benches);

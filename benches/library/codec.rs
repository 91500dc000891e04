//! What a core makes of clusters, level by level.

use std::fs::File;
use std::hint::black_box;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use criterion::{BenchmarkId, Criterion, Throughput};
use qtk_block::is_zero;
use qtk_qcow2::CompressionType;
use qtk_qcow2::codec::{self, Compressor, decompress};

const CLUSTER: usize = 64 << 10;
/// Clusters of the sample.
const SAMPLE: usize = 64;
const LEVELS: [(CompressionType, &[i32]); 2] =
    [(CompressionType::Zlib, &[1, 2, 3, 4, 6, 9, 12]), (CompressionType::Zstd, &[-5, -1, 1, 2, 3, 6, 9, 19])];

/// Clusters from all over a file that holds what disks hold: `QTK_BENCH_DATA`, such as a raw image, or else this program.
fn sample() -> Vec<Vec<u8>> {
    let path = std::env::var_os("QTK_BENCH_DATA").map(PathBuf::from);
    let path = path.unwrap_or_else(|| std::env::current_exe().expect("this program has a file"));
    let file = File::open(path).expect("the sample's file");
    let clusters = file.metadata().expect("the sample's file").len() / CLUSTER as u64;
    let mut all = (0..clusters).filter_map(|index| {
        let mut cluster = vec![0; CLUSTER];
        file.read_exact_at(&mut cluster, index * CLUSTER as u64).expect("a file that can be read");
        (!is_zero(&cluster)).then_some(cluster)
    });
    let every = usize::try_from(clusters).expect("a file of this machine").div_ceil(SAMPLE);
    let sample: Vec<_> = all.by_ref().step_by(every.min(100)).take(SAMPLE).collect();
    assert!(!sample.is_empty(), "the sample's file holds no cluster that is not zero");
    sample
}

pub(crate) fn benches(c: &mut Criterion) {
    let sample = sample();
    let bytes = (sample.len() * CLUSTER) as u64;
    let mut group = c.benchmark_group("codec");
    group.throughput(Throughput::Bytes(bytes)).sample_size(10);
    for (kind, levels) in LEVELS {
        // Libraries without C have fewer.
        let (known, _) = codec::levels(kind);
        for &level in levels.iter().filter(|level| known.contains(level)) {
            let mut compressor = Compressor::new(kind, Some(level)).expect("a valid level");
            let mut out = vec![0; CLUSTER];
            // Criterion has no other place for the size.
            let per_mille = compress(&mut compressor, &sample, &mut out) * 1000 / (sample.len() * CLUSTER);
            let id = BenchmarkId::new(format!("compress {}", kind.name()), format!("{level} to .{per_mille:03}"));
            group.bench_function(id, |b| b.iter(|| compress(&mut compressor, &sample, &mut out)));
        }
        let packed = pack(kind, &sample);
        let mut out = vec![0; CLUSTER];
        group.throughput(Throughput::Bytes((packed.len() * CLUSTER) as u64));
        group.bench_function(format!("decompress {}", kind.name()), |b| {
            b.iter(|| packed.iter().try_for_each(|cluster| decompress(kind, black_box(cluster), &mut out)));
        });
        group.throughput(Throughput::Bytes(bytes));
    }
    group.finish();
    zero_detection(c, &sample[0]);
}

/// Bytes that the clusters take; one that does not shrink takes all of its own.
fn compress(compressor: &mut Compressor, sample: &[Vec<u8>], out: &mut [u8]) -> usize {
    let len = |cluster: &Vec<u8>| compressor.compress(black_box(cluster), out).expect("a sound codec");
    sample.iter().map(len).map(|len| len.unwrap_or(CLUSTER)).sum()
}

/// Those that shrink, compressed at the default level.
fn pack(kind: CompressionType, sample: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let mut compressor = Compressor::new(kind, None).expect("the default level");
    let mut out = vec![0; CLUSTER];
    let packed = sample.iter().filter_map(|cluster| {
        let len = compressor.compress(cluster, &mut out).expect("a sound codec")?;
        Some(out[..len].to_vec())
    });
    packed.collect()
}

fn zero_detection(c: &mut Criterion, data: &[u8]) {
    let zeroes = vec![0; CLUSTER];
    let mut late = zeroes.clone();
    late[CLUSTER - 1] = 1;
    let mut group = c.benchmark_group("zero detection");
    group.throughput(Throughput::Bytes(CLUSTER as u64));
    for (name, bytes) in [("zeroes", &zeroes[..]), ("zeroes but the last byte", &late), ("data", data)] {
        group.bench_function(name, |b| b.iter(|| is_zero(black_box(bytes))));
    }
    group.finish();
}

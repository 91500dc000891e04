//! Random chains, written in transactions, against a model in memory and `qemu-img`.

use std::path::PathBuf;

use proptest::prelude::*;
use qtk_block::{BlockRead, BlockWrite, NoProgress};
use qtk_image::{FlattenOptions, Format, Image, NewImage, OpenOptions, create_image, flatten};
use qtk_qcow2::CompressionType;
use qtk_qcow2::{ClusterBits, CreateOptions};

use crate::common::{Folder, noise};

const SECTOR: usize = 512;

#[derive(Clone, Debug)]
enum Change {
    Noise,
    Text,
    Zero,
}

#[derive(Clone, Debug)]
struct Layer {
    sectors: usize,
    cluster_bits: u32,
    changes: Vec<(Change, usize, usize)>,
}

fn layer() -> impl Strategy<Value = Layer> {
    let change = prop_oneof![Just(Change::Noise), Just(Change::Text), Just(Change::Zero)];
    let changes = proptest::collection::vec((change, 0..2_000_000_usize, 1..300_000_usize), 1..8);
    (1..4000_usize, 9..=21_u32, changes).prop_map(|(sectors, cluster_bits, changes)| Layer {
        sectors,
        cluster_bits,
        changes,
    })
}

fn apply(layer: &Layer, image: &dyn BlockWrite, model: &mut [u8]) {
    for (seed, (change, start, len)) in layer.changes.iter().enumerate() {
        let (start, end) = (*start.min(&model.len()), (start + len).min(model.len()));
        let part = &mut model[start..end];
        if part.is_empty() {
            continue;
        }
        match change {
            Change::Noise => part.copy_from_slice(&noise(seed as u64 + 1, part.len())),
            Change::Text => part.fill(b'a' + u8::try_from(seed).unwrap()),
            Change::Zero => part.fill(0),
        }
        match change {
            Change::Zero => image.zero(start as u64..end as u64).unwrap(),
            _ => image.write_at(part, start as u64).unwrap(),
        }
    }
}

fn build(folder: &Folder, raw_base: bool, layers: &[Layer]) -> (PathBuf, Vec<u8>) {
    let mut model = Vec::new();
    let mut base: Option<PathBuf> = None;
    for (depth, layer) in layers.iter().enumerate() {
        let format = if depth == 0 && raw_base { Format::Raw } else { Format::Qcow2 };
        let path = folder.file(&depth.to_string());
        let new = NewImage {
            format,
            size: Some((layer.sectors * SECTOR) as u64),
            qcow2: CreateOptions {
                cluster_bits: ClusterBits::new(layer.cluster_bits).unwrap(),
                ..CreateOptions::default()
            },
            base,
            ..NewImage::default()
        };
        create_image(&path, &new).unwrap();
        model.resize(layer.sectors * SECTOR, 0);
        let options = OpenOptions { format: Some(format), ..OpenOptions::writable() };
        let transaction = Image::open(&path, &options).unwrap().begin().unwrap();
        apply(layer, &transaction, &mut model);
        transaction.commit().unwrap();
        base = Some(path);
    }
    (base.unwrap(), model)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn read_and_flatten_as_the_model_says(
        raw_base in any::<bool>(),
        layers in proptest::collection::vec(layer(), 1..4),
        kinds in proptest::array::uniform2(prop_oneof![
            Just(None), Just(Some(CompressionType::Zlib)), Just(Some(CompressionType::Zstd))
        ]),
        cluster_bits in 9..=21_u32,
    ) {
        let folder = Folder::new();
        let (top, model) = build(&folder, raw_base && layers.len() > 1, &layers);
        let image = Image::open(&top, &OpenOptions::default()).unwrap();
        let mut content = vec![0; model.len()];
        image.read_at(&mut content, 0).unwrap();
        prop_assert!(content == model);
        std::fs::write(folder.file("model"), &model).unwrap();
        // Twice, so that the second meets compressed clusters.
        let mut source = image;
        for (round, compression) in kinds.into_iter().enumerate() {
            let name = format!("out{round}");
            let options = FlattenOptions { compression, cluster_size: Some(1 << cluster_bits), ..FlattenOptions::default() };
            flatten(&source, &folder.file(&name), &options, &NoProgress).unwrap();
            folder.check(&name);
            folder.qemu_img(&["compare", "-f", "raw", "-F", "qcow2", "model", &name]);
            source = Image::open(folder.file(&name), &OpenOptions::default()).unwrap();
        }
    }
}

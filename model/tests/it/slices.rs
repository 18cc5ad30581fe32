//! Slices: encoders, blobs, and a model that computes with them.

use std::{fs, path::PathBuf};

use coel_model::{
    kernels::cpu::CpuKernels,
    nn::batch::Want,
    serve::{
        device::Device,
        engine::{Engine, EngineOptions, block_on},
    },
    weights::{
        layout::ExpertId,
        matrix::{DType, Matrix},
        memory::WeightBytes,
        parts::{Part, PartKind, TensorRange, parts},
        slices::{
            BASE_CELL, BLOCK_ROWS, GROUP, PartBlobs, Precision, REFINE_CELL, SliceError, Sliced,
            encode::{EncodeError, EncodeErrorKind, Encoder, first_not_finite, slice_matrix},
        },
        slicing::part_slices::{part_bytes, write_part},
        tensors::{ElementType, Tensors},
    },
};
use half::{bf16, f16};
use proptest::{collection::vec, prelude::*};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use safetensors::SafeTensors;

use crate::whole::{Whole, checkpoint};

fn pack(values: &[f32], dtype: DType) -> Vec<u8> {
    match dtype {
        DType::BF16 => values.iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes()).collect(),
        DType::F16 => values.iter().flat_map(|value| f16::from_f32(*value).to_le_bytes()).collect(),
        DType::F32 => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
    }
}

type Encoded = Result<(Vec<u8>, Vec<u8>), EncodeError>;

fn encode(encoder: Encoder, dtype: DType, bytes: &[u8], cols: usize) -> Encoded {
    let groups = cols / GROUP;
    // The buffers start dirty, so that padding that is not written shows.
    let (mut base, mut refine) = (vec![0xa5; groups * BASE_CELL], vec![0x5a; groups * REFINE_CELL]);
    encoder.block(dtype, bytes, cols, &mut base, &mut refine)?;
    Ok((base, refine))
}

/// Weights of all kinds: ordinary, of one value, spread over all scales, raw bits (finite or not), and on ties.
fn group() -> impl Strategy<Value = Vec<f32>> {
    let scaled = |exponent: i32| {
        vec(-1.0f32..1.0, GROUP).prop_map(move |w| w.iter().map(|w| w * 10f32.powi(exponent)).collect())
    };
    let tie = (-14i32..4, vec(8u16..502, GROUP)).prop_map(|(exponent, halves)| {
        let s = 2f32.powi(exponent);
        let mut w: Vec<f32> = halves.iter().map(|half| f32::from(*half) * 0.5 * s).collect();
        (w[3], w[30]) = (4.0 * s, 251.0 * s);
        w
    });
    prop_oneof![
        4 => (-12i32..5).prop_flat_map(scaled),
        1 => any::<f32>().prop_map(|w| vec![w; GROUP]),
        1 => vec(prop_oneof![Just(0.0f32), Just(-0.0)], GROUP),
        1 => vec(-1e-39f32..1e-39, GROUP),
        1 => vec(-70000.0f32..70000.0, GROUP),
        1 => vec(any::<u32>().prop_map(|bits| f32::from_bits(bits & 0xc7ff_ffff)), GROUP),
        1 => vec(any::<u32>().prop_map(f32::from_bits), GROUP),
        2 => tie,
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    #[test]
    fn encoders_agree_to_the_byte(
        dtype in prop_oneof![Just(DType::BF16), Just(DType::F16), Just(DType::F32)],
        rows in 1usize..=BLOCK_ROWS,
        groups in 1usize..4,
        pool in vec(group(), 3 * BLOCK_ROWS),
    ) {
        let cols = groups * GROUP;
        let values = pool.concat();
        let bytes = pack(&values[..rows * cols], dtype);
        let encoders = Encoder::available();
        let expected = encode(encoders[0], dtype, &bytes, cols);
        for encoder in &encoders[1..] {
            prop_assert!(encode(*encoder, dtype, &bytes, cols) == expected, "{}", encoder.name());
        }
        if let Ok((base, refine)) = expected {
            let sliced = Sliced::new(rows, cols, base.into(), Some(refine.into())).unwrap();
            check_distance(&sliced, dtype, &bytes);
        }
    }

    #[test]
    fn the_first_weight_that_is_no_number_is_found(
        dtype in prop_oneof![Just(DType::BF16), Just(DType::F16), Just(DType::F32)],
        count in 1usize..9000,
        at in 0usize..9000,
        bad in prop_oneof![Just(f32::NAN), Just(f32::INFINITY), Just(f32::NEG_INFINITY)],
    ) {
        let mut values = vec![1.5; count];
        prop_assert_eq!(first_not_finite(dtype, &pack(&values, dtype)), None);
        if at < count {
            values[at..].fill(bad);
            prop_assert_eq!(first_not_finite(dtype, &pack(&values, dtype)), Some(at));
        }
    }
}

/// No weight is further from its level than the roundings allow.
fn check_distance(sliced: &Sliced, dtype: DType, bytes: &[u8]) {
    let (rows, cols) = (sliced.rows(), sliced.cols());
    let mut exact = vec![0.0; rows * cols];
    dtype.widen(bytes, &mut exact);
    let mut found = vec![0.0; cols];
    for row in 0..rows {
        sliced.widen_row(row, &mut found);
        for (exact, found) in exact[row * cols..].chunks_exact(GROUP).zip(found.chunks_exact(GROUP)) {
            let max = exact.iter().copied().fold(f32::MIN, f32::max);
            let min = exact.iter().copied().fold(f32::MAX, f32::min);
            // Half a step at the largest scale that is tried; or the group's range is too small for anything but zeros.
            let step = (max.max(0.0) - min.min(0.0)).max(2f32.powi(-24)) / 256.0 * 1.0625f32.powi(4);
            let inside = 0.51 * step + 2f32.powi(-24);
            for (exact, found) in exact.iter().zip(found) {
                // Weights near the ends of the range may lie beyond the last level, by no more than the search allows.
                let at_an_end = (exact - min).min(max - exact) <= 9.0 * step + inside;
                let bound = inside + if at_an_end { 9.0 * step } else { 0.0 };
                assert!((exact - found).abs() <= bound, "{exact} became {found} in a group from {min} to {max}");
            }
        }
    }
}

#[test]
fn faults_say_what_and_where() {
    let (rows, cols) = (5, 96);
    let mut values: Vec<f32> = (0..rows * cols).map(|index| (index as f32).sin()).collect();
    values[3 * cols + 70] = f32::NAN;
    values[4 * cols + 70] = f32::INFINITY;
    let not_finite = EncodeError { row: 3, column: 70, kind: EncodeErrorKind::NotFinite };
    let mut wide = vec![0.0f32; rows * cols];
    (wide[2 * cols + 33], wide[2 * cols + 50]) = (3e38, -3e38);
    let range = EncodeError { row: 2, column: 32, kind: EncodeErrorKind::Range { min: -3e38, max: 3e38 } };
    let mut far = vec![0.0f32; rows * cols];
    far[cols..cols + 32].fill(16000.0);
    let offset = EncodeError { row: 1, column: 0, kind: EncodeErrorKind::Range { min: 16000.0, max: 16000.0 } };
    for encoder in Encoder::available() {
        for (values, fault) in [(&values, not_finite), (&wide, range), (&far, offset)] {
            let found = encode(encoder, DType::F32, &pack(values, DType::F32), cols);
            assert_eq!(found.unwrap_err(), fault, "{}", encoder.name());
        }
    }
}

#[test]
fn slicing_a_matrix_is_slicing_its_blocks() {
    let (rows, cols) = (37, 64);
    let values: Vec<f32> = (0..rows * cols).map(|index| (index as f32 * 0.7).sin()).collect();
    let matrix = Matrix::new(pack(&values, DType::BF16).into(), DType::BF16, rows, cols).unwrap();
    let q8 = slice_matrix(&matrix, Precision::Q8).unwrap().unwrap();
    let q4 = slice_matrix(&matrix, Precision::Q4).unwrap().unwrap();
    assert_eq!((q4.precision(), q8.precision()), (Precision::Q4, Precision::Q8));
    assert_eq!(q4.base(), q8.base());
    let mut at = 0;
    for first in (0..rows).step_by(BLOCK_ROWS) {
        let bytes = matrix.rows_bytes(first..rows.min(first + BLOCK_ROWS));
        let (base, refine) = encode(Encoder::best(), DType::BF16, bytes, cols).unwrap();
        assert_eq!(&q8.base()[at * BASE_CELL..][..base.len()], base);
        assert_eq!(&q8.refine().unwrap()[at * REFINE_CELL..][..refine.len()], refine);
        at += cols / GROUP;
    }
    let odd = Matrix::new(vec![0; 66].into(), DType::BF16, 1, 33).unwrap();
    assert!(slice_matrix(&odd, Precision::Q4).is_none());
}

fn gaussian(count: usize) -> Vec<f32> {
    let mut random = ChaCha8Rng::seed_from_u64(9);
    let mut pair = || {
        let (u, v): (f64, f64) = (1.0 - random.random::<f64>(), random.random());
        ((-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()) as f32
    };
    (0..count).map(|_| 0.02 * pair()).collect()
}

fn squared_error(exact: &[f32], found: &[f32]) -> f64 {
    exact.iter().zip(found).map(|(exact, found)| f64::from(exact - found).powi(2)).sum()
}

/// The block formats of other engines, as those define them: 32 weights, f16 constants.
fn other_formats(values: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let rounded = |value: f32| f16::from_f32(value).to_f32();
    let (mut four, mut eight) = (Vec::new(), Vec::new());
    for block in values.chunks_exact(GROUP) {
        let max = block.iter().copied().fold(f32::MIN, f32::max);
        let min = block.iter().copied().fold(f32::MAX, f32::min);
        let step = (max - min) / 15.0;
        let level = |w: f32| ((w - min) / step + 0.5).floor().min(15.0);
        four.extend(block.iter().map(|w| rounded(step) * level(*w) + rounded(min)));
        let step = max.max(-min) / 127.0;
        eight.extend(block.iter().map(|w| rounded(step) * (w / step).round()));
    }
    (four, eight)
}

#[test]
fn the_error_on_gaussian_weights_is_below_that_of_the_usual_formats() {
    let (rows, cols) = (512, 1024);
    let values = gaussian(rows * cols);
    let matrix = Matrix::new(pack(&values, DType::F32).into(), DType::F32, rows, cols).unwrap();
    let error = |precision| {
        let sliced = slice_matrix(&matrix, precision).unwrap().unwrap();
        let mut found = vec![0.0; rows * cols];
        found.chunks_exact_mut(cols).enumerate().for_each(|(row, out)| sliced.widen_row(row, out));
        squared_error(&values, &found)
    };
    let (four, eight) = other_formats(&values);
    let ratio_4 = error(Precision::Q4) / squared_error(&values, &four);
    let ratio_8 = error(Precision::Q8) / squared_error(&values, &eight);
    assert!((0.83..0.85).contains(&ratio_4) && (0.75..0.79).contains(&ratio_8), "{ratio_4} {ratio_8}");
}

fn golden(name: &str) -> Vec<u8> {
    let path = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden-slices")).join(name);
    fs::read(path).expect("a committed file")
}

/// All tensors of a safetensors file as one part, in the order of the file.
fn part_of(file: &[u8]) -> Part {
    let tensors = Tensors::parse(file.to_vec().into(), "a part").unwrap();
    let ranges = tensors.iter().map(|(name, view)| TensorRange {
        name: name.to_owned(),
        dtype: match view.element {
            ElementType::Weight(dtype) => dtype,
            other => panic!("{other:?}"),
        },
        shape: view.shape.clone(),
        file: 0,
        offset: view.offset,
        bytes: view.bytes.len() as u64,
    });
    let mut ranges: Vec<_> = ranges.collect();
    ranges.sort_by_key(|range| range.offset);
    Part { kind: PartKind::Trunk { name: "golden".into() }, tensors: ranges }
}

fn slice_part(part: &Part, file: &[u8]) -> Result<(Vec<u8>, Vec<u8>), SliceError> {
    let (mut base, mut refine) = (Vec::new(), Vec::new());
    let source = [WeightBytes::from(file.to_vec())];
    write_part(part, source.as_slice(), &mut base, &mut refine)?;
    Ok((base, refine))
}

#[test]
fn a_third_implementation_wrote_the_same_bytes() {
    let exact = golden("exact.safetensors");
    let part = part_of(&exact);
    let (base, refine) = slice_part(&part, &exact).unwrap();
    assert!(base == golden("base.safetensors") && refine == golden("refine.safetensors"));
    let bytes = part_bytes(&part).unwrap();
    assert_eq!((bytes.base, bytes.refine), (base.len() as u64, refine.len() as u64));
    for (blob, slice) in [(&base, "base"), (&refine, "refine")] {
        let (length, metadata) = SafeTensors::read_metadata(blob).expect("another reader reads it");
        assert_eq!(metadata.metadata().as_ref().unwrap()["coel.slice"], slice);
        let tensors = metadata.tensors();
        let cells = tensors.iter().filter(|(_, info)| info.shape.len() == 3);
        let mut names: Vec<&str> = cells.clone().map(|(name, _)| name.as_str()).collect();
        names.sort();
        assert_eq!(names, ["a.down_proj.weight", "a.q_proj.weight", "a.up_proj.weight"]);
        assert_eq!(cells.map(|(_, info)| (8 + length + info.data_offsets.0) % 32).collect::<Vec<_>>(), [0; 3]);
    }
}

#[test]
fn what_cannot_be_sliced_is_named() {
    let file = golden("exact.safetensors");
    let part = part_of(&file);
    let check = |part: &Part, file: &[u8], words: &[&str]| {
        let message = slice_part(part, file).unwrap_err().to_string();
        for word in words {
            assert!(message.contains(word), "{message:?} does not name {word:?}");
        }
    };
    let change = |name: &str, element: usize, bytes: &[u8]| {
        let tensor = part.tensors.iter().find(|tensor| tensor.name == name).unwrap();
        let mut changed = file.clone();
        changed[tensor.offset as usize + element * tensor.dtype.size()..][..bytes.len()].copy_from_slice(bytes);
        changed
    };
    let nan = change("a.q_proj.weight", 17 * 64 + 40, &bf16::NAN.to_le_bytes());
    check(&part, &nan, &["a.q_proj.weight", "row 17", "column 40", "not a finite"]);
    let infinite = change("a.gate.weight", 2 * 32 + 9, &bf16::INFINITY.to_le_bytes());
    check(&part, &infinite, &["a.gate.weight", "row 2", "column 9", "not a finite"]);
    let huge = change("a.down_proj.weight", 96 + 40, &1e30f32.to_le_bytes());
    check(&part, &huge, &["a.down_proj.weight", "row 1", "columns 32 to 63", "1e30", "--precision exact"]);
    check(&part, &file[..file.len() - 1], &["a.down_proj.weight", "cannot be read"]);

    let mut odd = part.clone();
    odd.tensors.iter_mut().find(|tensor| tensor.name == "a.up_proj.weight").unwrap().shape = vec![32, 33];
    check(&odd, &file, &["a.up_proj.weight", "33 columns", "multiple of 32", "--precision exact"]);
    assert!(part_bytes(&odd).unwrap_err().to_string().contains("a.up_proj.weight"));
}

#[test]
fn a_strangers_slices_are_refused_not_trusted() {
    let (base, refine) = (golden("base.safetensors"), golden("refine.safetensors"));
    let check = |main: Vec<u8>, refine: Option<Vec<u8>>, words: &[&str]| {
        let blobs = PartBlobs { main: main.into(), refine: refine.map(WeightBytes::from) };
        let message = Tensors::parse_part(blobs, "blob-7").unwrap_err().to_string();
        for word in ["blob-7"].iter().chain(words) {
            assert!(message.contains(word), "{message:?} does not name {word:?}");
        }
    };
    let replace = |bytes: &[u8], from: &str, to: &str| {
        assert_eq!(from.len(), to.len());
        let at = bytes.windows(from.len()).position(|window| window == from.as_bytes()).unwrap();
        let mut bytes = bytes.to_vec();
        bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
        bytes
    };
    assert!(
        Tensors::parse_part(PartBlobs { main: base.clone().into(), refine: Some(refine.clone().into()) }, "x").is_ok()
    );
    check(base[..base.len() - 1].to_vec(), None, &["truncated"]);
    check(replace(&base, r#"format":"3""#, r#"format":"2""#), None, &["format \"2\"", "reads 3"]);
    check(replace(&base, r#"slice":"base""#, r#"slice":"bass""#), None, &["bass", "no slice"]);
    check(replace(&base, "coel.slice", "coel.slide"), None, &["U8"]);
    // 2 x 2 x 288 bytes in another shape.
    check(replace(&base, "[2,2,288]", "[4,1,288]"), Some(refine.clone()), &["a.q_proj.weight", "refine"]);
    check(replace(&base, "[2,2,288]", "[2,4,144]"), None, &["a.q_proj.weight", "U8"]);
    check(base.clone(), Some(base.clone()), &["refine slice does not go with"]);
    check(golden("exact.safetensors"), Some(refine.clone()), &["refine slice does not go with"]);
    check(base.clone(), Some(golden("exact.safetensors")), &["refine slice does not go with"]);
    check(replace(&base, "a.q_proj.weight", "b.q_proj.weight"), Some(refine), &["only the refine", "a.q_proj.weight"]);
}

/// Base and refine blobs of every part of the bundled model.
fn sliced_parts() -> Vec<(Part, PartBlobs)> {
    let checkpoint = checkpoint();
    let files: Vec<_> = checkpoint.weight_files().iter().map(|path| fs::File::open(path).unwrap()).collect();
    let slice = |part: Part| {
        let (mut base, mut refine) = (Vec::new(), Vec::new());
        write_part(&part, files.as_slice(), &mut base, &mut refine).unwrap();
        (part, PartBlobs { main: base.into(), refine: Some(refine.into()) })
    };
    parts(&checkpoint).into_iter().map(slice).collect()
}

#[test]
fn an_engine_holds_experts_in_any_form() {
    let checkpoint = checkpoint();
    let parts = sliced_parts();
    let engine = Engine::start(Device::Cpu, checkpoint.config().clone(), EngineOptions::default()).unwrap();
    let trunk = parts.iter().filter(|(part, _)| part.expert().is_none()).map(|(_, blobs)| blobs.clone());
    block_on(engine.load_trunk(trunk.collect())).unwrap();
    let id = ExpertId { layer: 1, index: 7 };
    let (part, blobs) = parts.iter().find(|(part, _)| part.expert() == Some(id)).unwrap();
    let mut rows = vec![0.0; 256];
    rows.iter_mut().enumerate().for_each(|(index, value)| *value = (index as f32).sin());
    let mut outputs = Vec::new();
    let bytes = 3 * 96 * 256;
    let base = PartBlobs { refine: None, ..blobs.clone() };
    for (blobs, precision, bytes) in
        [(base, Precision::Q4, bytes * 9 / 16), (blobs.clone(), Precision::Q8, bytes * 17 / 16)]
    {
        block_on(engine.load_expert(id, blobs)).unwrap();
        assert_eq!(engine.held().into_iter().collect::<Vec<_>>(), [(id, precision)]);
        assert_eq!(engine.memory().expert_bytes, bytes);
        outputs.push(block_on(engine.run_experts(1, rows.clone(), vec![(7, vec![0])])).unwrap());
    }
    block_on(engine.load_expert_tensors(id, checkpoint.expert(id))).unwrap();
    assert_eq!(engine.held()[&id], Precision::Exact);
    assert_eq!(engine.memory().expert_bytes, part.data_bytes());
    let exact = block_on(engine.run_experts(1, rows, vec![(7, vec![0])])).unwrap();
    let relative = |found: &[f32]| (squared_error(&exact, found) / squared_error(&exact, &vec![0.0; 256])).sqrt();
    let (four, eight) = (relative(&outputs[0]), relative(&outputs[1]));
    // Q8 steps are sixteen times finer, but activations have eight bits at both precisions.
    assert!(eight < 0.02 && four < 0.2 && eight < four / 4.0, "{four} {eight}");

    // A refine slice alone is not an expert, and neither is a base with another expert's refine slice.
    let alone = PartBlobs { main: blobs.refine.clone().unwrap(), refine: None };
    let message = block_on(engine.load_expert(id, alone)).unwrap_err().to_string();
    assert!(message.contains("refine"), "{message}");
    let other = parts.iter().find(|(part, _)| part.expert() == Some(ExpertId { layer: 1, index: 8 })).unwrap();
    let mixed = PartBlobs { main: blobs.main.clone(), refine: other.1.refine.clone() };
    assert!(block_on(engine.load_expert(id, mixed)).is_err());
    assert_eq!(engine.held()[&id], Precision::Exact, "what was there is still there");
}

#[test]
fn eight_bits_stay_close_and_four_bits_closer_than_chance() {
    let checkpoint = checkpoint();
    let mut exact = Whole::new(CpuKernels::default(), &checkpoint);
    let tokens = [5, 17, 300, 4000, 9, 55, 901];
    let mut solo = exact.solo(8);
    let expected = exact.advance(&mut solo, &tokens, Want::All, |_| {});
    let parts = sliced_parts();
    let mut errors = Vec::new();
    for precision in [Precision::Q4, Precision::Q8] {
        let tensors = |blobs: &PartBlobs| {
            let refine = blobs.refine.clone().filter(|_| precision == Precision::Q8);
            Tensors::parse_part(PartBlobs { refine, ..blobs.clone() }, "blob").unwrap()
        };
        let trunk = parts.iter().filter(|(part, _)| part.expert().is_none()).map(|(_, blobs)| tensors(blobs));
        let trunk = Tensors::merge(trunk.collect::<Vec<_>>()).unwrap();
        let expert = |id| tensors(&parts.iter().find(|(part, _)| part.expert() == Some(id)).unwrap().1);
        let mut whole = Whole::from_tensors(CpuKernels::default(), &checkpoint, trunk, expert);
        let mut solo = whole.solo(8);
        let found = whole.advance(&mut solo, &tokens, Want::All, |_| {});
        errors.push((squared_error(&expected, &found) / squared_error(&expected, &vec![0.0; expected.len()])).sqrt());
    }
    assert!(errors[0] < 0.3 && errors[1] < 0.03, "{errors:?}");
}

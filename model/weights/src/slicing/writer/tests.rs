//! The loop with a sink in memory: what is made, in which order, and what an interruption leaves.

use std::{cell::Cell, io};

use super::*;
use crate::{matrix::DType, memory::WeightBytes, parts::TensorRange, slices::GROUP};

/// Parts of a matrix and a norm each. In the file the matrix comes last.
fn parts(count: usize) -> (Vec<Part>, WeightBytes) {
    let (rows, columns) = (3, GROUP);
    let (matrix, norm) = ((rows * columns * 2) as u64, 8);
    let tensor = |name: &str, shape: &[usize], offset, bytes| TensorRange {
        name: name.into(),
        dtype: DType::BF16,
        shape: shape.into(),
        file: 0,
        offset,
        bytes,
    };
    let part = |index: usize| {
        let start = index as u64 * (matrix + norm);
        let tensors = vec![
            tensor("norm.weight", &[4], start, norm),
            tensor("up_proj.weight", &[rows, columns], start + norm, matrix),
        ];
        Part { kind: PartKind::Trunk { name: format!("layer.{index}") }, tensors }
    };
    let weights = (0..count * (matrix + norm) as usize / 2).flat_map(|index| [index as u8, 0x3f]);
    ((0..count).map(part).collect(), weights.collect::<Vec<_>>().into())
}

#[derive(Debug, PartialEq)]
enum Failure {
    Stopped,
    Changed,
    Slice(String),
}

/// What was made of a part: its slices, if any, and its exact blob.
#[derive(Clone, Debug, PartialEq)]
struct Entry {
    slices: Option<[Vec<u8>; 2]>,
    exact: Vec<u8>,
}

#[derive(Default)]
struct Memory {
    entries: Vec<Option<Entry>>,
    /// Slices that may belong to a part, and the exact blob that they were made of.
    found: Option<(usize, Entry)>,
    first: Option<usize>,
    may_hold_exactly: bool,
    order: Vec<usize>,
    flushed: usize,
}

impl Memory {
    fn new(parts: usize) -> Self {
        Self { entries: vec![None; parts], ..Self::default() }
    }
}

impl SliceSink for Memory {
    type Writer = Vec<u8>;
    type Digest = Vec<u8>;
    type Error = Failure;

    fn digest(&self) -> Option<Vec<u8>> {
        Some(Vec::new())
    }

    fn first(&self) -> Option<usize> {
        self.first
    }

    fn kept(&mut self, index: usize) -> Result<Kept, Failure> {
        Ok(match (&self.entries[index], &self.found) {
            (Some(_), _) => Kept::Whole,
            (None, Some((found, _))) if *found == index => Kept::Slices,
            _ => Kept::Nothing,
        })
    }

    fn belongs(&mut self, _: usize, exact: &Vec<u8>) -> bool {
        self.found.as_ref().is_some_and(|(_, entry)| entry.exact == *exact)
    }

    fn begin(&mut self, _: usize) -> Result<Option<[Vec<u8>; 2]>, Failure> {
        Ok(Some([Vec::new(), Vec::new()]))
    }

    fn holds_exactly(&mut self, _: usize, why: &SliceError) -> bool {
        self.may_hold_exactly && matches!(why, SliceError::Range { .. })
    }

    fn finish(&mut self, index: usize, made: Made<Vec<u8>>, exact: Option<Vec<u8>>) -> Result<(), Failure> {
        let slices = match made {
            Made::Slices(slices) => Some(slices),
            Made::Kept => self.found.take().unwrap().1.slices,
            Made::ExactOnly => None,
        };
        self.entries[index] = Some(Entry { slices, exact: exact.unwrap() });
        self.order.push(index);
        Ok(())
    }

    fn flush(&mut self) -> Result<(), Failure> {
        self.flushed += 1;
        Ok(())
    }

    fn fail(&mut self, error: PartError<Failure>) -> Failure {
        match error {
            PartError::Slice { part, source } => Failure::Slice(format!("{part}: {source}")),
            PartError::Source(_) => Failure::Changed,
            PartError::Sink(error) => error,
        }
    }
}

fn run(parts: &[Part], bytes: &WeightBytes, sink: &mut Memory) -> Result<(), Failure> {
    slice_parts(parts, std::slice::from_ref(bytes), sink, |_, _| Ok(()))
}

#[test]
fn every_part_is_sliced_and_its_exact_blob_hashed() {
    let (parts, bytes) = parts(3);
    let mut sink = Memory::new(3);
    let mut seen = Vec::new();
    slice_parts(&parts, std::slice::from_ref(&bytes), &mut sink, |done, total| {
        seen.push((done, total));
        Ok(())
    })
    .unwrap();
    assert_eq!((sink.order.as_slice(), sink.flushed), (&[0, 1, 2][..], 1));
    assert_eq!(seen, [(0, 600), (200, 600), (400, 600), (600, 600)]);
    for (index, (part, entry)) in parts.iter().zip(&sink.entries).enumerate() {
        let entry = entry.as_ref().unwrap();
        // Slicing reads the matrix first: the exact blob has the norm first all the same.
        assert_eq!(entry.exact, [&part.header()[..], &bytes.as_slice()[200 * index..][..200]].concat());
        let (mut base, mut refine) = (Vec::new(), Vec::new());
        write_part(part, std::slice::from_ref(&bytes), &mut base, &mut refine).unwrap();
        assert_eq!(entry.slices, Some([base, refine]));
    }
}

#[test]
fn an_interrupted_run_goes_on_with_what_is_missing() {
    let (parts, bytes) = parts(4);
    let (mut whole, mut sink) = (Memory::new(4), Memory::new(4));
    run(&parts, &bytes, &mut whole).unwrap();
    let stopped = slice_parts(&parts, std::slice::from_ref(&bytes), &mut sink, |done, _| match done {
        400 => Err(Failure::Stopped),
        _ => Ok(()),
    });
    assert_eq!((stopped, sink.order.as_slice(), sink.flushed), (Err(Failure::Stopped), &[0, 1][..], 0));
    sink.first = Some(3);
    run(&parts, &bytes, &mut sink).unwrap();
    assert_eq!(sink.order, [0, 1, 3, 2]);
    assert_eq!(sink.entries, whole.entries);
}

#[test]
fn slices_that_are_kept_count_only_if_they_are_of_these_weights() {
    let (parts, bytes) = parts(2);
    let mut whole = Memory::new(2);
    run(&parts, &bytes, &mut whole).unwrap();
    let mine = whole.entries[1].clone().unwrap();
    let foreign = Entry { slices: Some([vec![1], vec![2]]), exact: b"other weights".to_vec() };
    for (found, left) in [(mine, false), (foreign, true)] {
        let mut sink = Memory { found: Some((1, found)), ..Memory::new(2) };
        run(&parts, &bytes, &mut sink).unwrap();
        assert_eq!(sink.entries, whole.entries);
        assert_eq!(sink.found.is_some(), left, "it is used only where it belongs");
    }
}

/// The weight `index` of part 1's matrix is `raw`.
fn spoilt(bytes: &WeightBytes, index: usize, raw: u16) -> Vec<u8> {
    let mut bytes = bytes.as_slice().to_vec();
    bytes[200 + 8 + 2 * index..][..2].copy_from_slice(&raw.to_le_bytes());
    bytes
}

#[test]
fn weights_beyond_the_scales_are_held_exactly_where_the_sink_does_so() {
    let (parts, bytes) = parts(2);
    let large = WeightBytes::from(spoilt(&bytes, 0, 0x7180)); // 2^100
    let mut sink = Memory::new(2);
    let refused = run(&parts, &large, &mut sink).unwrap_err();
    assert!(
        matches!(&refused, Failure::Slice(why) if why.contains("layer.1") && why.contains("up_proj")),
        "{refused:?}"
    );
    assert_eq!(sink.order, [0]);
    let mut sink = Memory { may_hold_exactly: true, ..Memory::new(2) };
    run(&parts, &large, &mut sink).unwrap();
    let entry = sink.entries[1].as_ref().unwrap();
    assert_eq!((&entry.slices, &entry.exact[parts[1].header().len()..]), (&None, &large.as_slice()[200..]));

    // Nobody encodes the weights after that, and they are looked at all the same.
    let mut infinite = spoilt(&large, 0, 0x7180);
    infinite[200 + 8 + 2 * 70..][..2].copy_from_slice(&0x7f80u16.to_le_bytes());
    let mut sink = Memory { may_hold_exactly: true, ..Memory::new(2) };
    let refused = run(&parts, &infinite.into(), &mut sink).unwrap_err();
    assert!(matches!(&refused, Failure::Slice(why) if why.contains("row 2, column 6: not a finite")), "{refused:?}");
}

/// A file that is written to after so many reads.
struct Changing<'a>(&'a WeightBytes, Cell<usize>);

impl ReadAt for Changing<'_> {
    fn read_at(&self, file: usize, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.1.set(self.1.get().saturating_sub(1));
        std::slice::from_ref(self.0).read_at(file, offset, into)
    }

    fn check_unchanged(&self, _: usize) -> Result<(), SourceError> {
        match self.1.get() {
            0 => Err(SourceError::Changed { path: "weights".into() }),
            _ => Ok(()),
        }
    }
}

#[test]
fn a_part_is_not_kept_if_its_file_changed_meanwhile() {
    let (parts, bytes) = parts(2);
    let mut sink = Memory::new(2);
    // Each part takes three reads: its matrix, its norm, and the matrix again for the hash.
    let error = slice_parts(&parts, &Changing(&bytes, Cell::new(5)), &mut sink, |_, _| Ok(()));
    assert_eq!((error, sink.order.as_slice()), (Err(Failure::Changed), &[0][..]));
}

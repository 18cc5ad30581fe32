//! The device's memory for weights.
//!
//! Owns [`Arena`]: a few large slabs that hold every matrix and vector, so that one launch reads the experts of a layer from
//! one binding, and [`SlabRange`], the words of one of them, given back when it is dropped. The arena grows by an eighth of
//! what it has, within bounds, or by what is reserved, and never shrinks: what one expert leaves the next one takes. What is written goes through a
//! buffer of bounded size, so loading takes no second copy of a large matrix.

use std::sync::{Arc, Mutex, PoisonError};

use cubecl::{
    CubeDim, Runtime, client::ComputeClient, future::block_on, prelude::ArrayArg, server::Handle, server::ServerError,
};

use crate::{
    cubes,
    device::memory,
    ranges::{ALIGNED, Range, Ranges},
};

/// Smallest and largest slab, in bytes.
const SLAB_LEAST: u64 = 16 << 20;
const SLAB_MOST: u64 = 256 << 20;
/// Slabs beside what was reserved are multiples of this.
const SLAB_STEP: u64 = 64 << 10;
/// Bytes written at once, and bytes that may be on their way.
const PIECE: usize = 16 << 20;
const PIECES_AHEAD: usize = 4;
const COPY_THREADS: u32 = 256;

/// Weights' memory on one device.
pub(crate) struct Arena<R: Runtime> {
    client: ComputeClient<R>,
    slabs: Vec<(Handle, u32)>,
    ranges: Arc<Mutex<Ranges>>,
    /// Bytes written since the device was waited for.
    ahead: usize,
    /// Something was reserved: it grows by no more than is needed.
    bounded: bool,
}

/// Words of a slab, until this is dropped.
#[derive(Debug)]
pub(crate) struct SlabRange {
    range: Range,
    ranges: Arc<Mutex<Ranges>>,
}

impl SlabRange {
    pub(crate) fn slab(&self) -> usize {
        self.range.slab
    }

    /// The first word.
    pub(crate) fn at(&self) -> u32 {
        self.range.at
    }
}

impl Drop for SlabRange {
    fn drop(&mut self) {
        self.ranges.lock().unwrap_or_else(PoisonError::into_inner).give_back(self.range);
    }
}

impl<R: Runtime> Arena<R> {
    pub(crate) fn new(client: ComputeClient<R>) -> Self {
        Self { client, slabs: Vec::new(), ranges: Arc::default(), ahead: 0, bounded: false }
    }

    /// Most bytes of one place.
    pub(crate) fn place_most(&self) -> usize {
        // A device's limit may be any number; slabs are whole ranges.
        (SLAB_MOST.min(self.client.properties().memory.max_page_size) & !0xFFFF) as usize
    }

    /// Slab `slab` as an argument of a kernel.
    pub(crate) fn slab(&self, slab: usize) -> ArrayArg<R> {
        let (handle, words) = &self.slabs[slab];
        // SAFETY: the handle is of so many words.
        unsafe { ArrayArg::from_raw_parts(handle.clone(), *words as usize) }
    }

    /// Brings `parts`, one behind the other and each of whole words, to the device.
    pub(crate) fn put(&mut self, parts: &[&[u8]]) -> SlabRange {
        let bytes: usize = parts.iter().map(|part| part.len()).sum();
        assert!(bytes <= self.place_most() && parts.iter().all(|part| part.len().is_multiple_of(4)));
        let place = self.place((bytes / 4) as u32);
        let mut at = place.at();
        for piece in parts.iter().flat_map(|part| part.chunks(PIECE)) {
            self.write(place.slab(), at, piece);
            at += (piece.len() / 4) as u32;
        }
        place
    }

    /// The first `bytes` of a place, a whole number of words, as they were put there.
    pub(crate) fn get(&self, place: &SlabRange, bytes: usize) -> Vec<u8> {
        let (handle, words) = &self.slabs[place.slab()];
        let (start, end) = (4 * u64::from(place.at()), 4 * u64::from(*words));
        let handle = handle.clone().offset_start(start).offset_end(end - start - bytes as u64);
        self.client.read_one(handle).expect("a device that computes can be read").to_vec()
    }

    /// What a matrix of `bytes` takes of the slabs, with its part of what is left at the end of one where several such lie.
    pub(crate) fn share(&self, bytes: u64) -> u64 {
        let slab = self.place_most() as u64;
        match slab / bytes.max(1) {
            0 => bytes.next_multiple_of(slab),
            // So many that the rest is next to nothing.
            each @ 1..64 => slab / each,
            _ => bytes,
        }
    }

    /// Takes slabs until `bytes` are free.
    pub(crate) fn reserve(&mut self, bytes: u64) {
        self.bounded = true;
        let ranges = self.ranges.clone();
        let mut ranges = ranges.lock().unwrap_or_else(PoisonError::into_inner);
        let mut short = (bytes / 4).saturating_sub(ranges.free());
        while short > 0 {
            let words = short.min(self.place_most() as u64 / 4).next_multiple_of(u64::from(ALIGNED)) as u32;
            self.add_slab(words);
            ranges.add_slab(words);
            short = short.saturating_sub(u64::from(words));
        }
    }

    /// Until everything is written and computed.
    pub(crate) fn wait(&mut self) {
        self.ahead = 0;
        // An error shows where results are read.
        let _: Result<(), ServerError> = block_on(self.client.sync());
    }

    fn place(&mut self, words: u32) -> SlabRange {
        let ranges = self.ranges.clone();
        let mut free = ranges.lock().unwrap_or_else(PoisonError::into_inner);
        let range = free.take(words).unwrap_or_else(|| {
            let slab = free.add_slab(self.grow(words));
            debug_assert_eq!(slab + 1, self.slabs.len());
            free.take(words).expect("a place is no larger than a slab")
        });
        drop(free);
        SlabRange { range, ranges }
    }

    /// Adds a slab of at least `words` words, and says of how many.
    fn grow(&mut self, words: u32) -> u32 {
        let held: u64 = self.slabs.iter().map(|(_, words)| 4 * u64::from(*words)).sum();
        let most = self.place_most() as u64;
        let needed = 4 * u64::from(words);
        let wanted = match self.bounded {
            true => needed.next_multiple_of(SLAB_STEP).min(most),
            false => needed.max(held / 8).next_multiple_of(SLAB_LEAST).min(most),
        };
        let words = (wanted / 4) as u32;
        self.add_slab(words);
        words
    }

    fn add_slab(&mut self, words: u32) {
        let slab = self.client.memory_persistent_allocation((), |()| self.client.empty(4 * words as usize));
        self.slabs.push((slab.expect("an allocation is only asked for here"), words));
    }

    fn write(&mut self, slab: usize, at: u32, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        let words = bytes.len() / 4;
        let from = self.client.create_from_slice(bytes);
        // SAFETY: the piece lies inside the place, and the place inside the slab.
        unsafe {
            memory::copy::launch_unchecked::<R>(
                &self.client,
                cubes(words.div_ceil(COPY_THREADS as usize)),
                CubeDim::new_1d(COPY_THREADS),
                ArrayArg::from_raw_parts(from, words),
                self.slab(slab),
                at,
                words as u32,
            );
        }
        self.ahead += bytes.len();
        if self.ahead >= PIECES_AHEAD * PIECE {
            self.wait();
        }
    }
}

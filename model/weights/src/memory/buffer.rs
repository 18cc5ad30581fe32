//! Memory that weights are read into.
//!
//! Owns [`Buffer`], anonymous memory of whole pages, and [`Buffers`], a pool of them. The invariant: the pool's buffers,
//! lent and free, never take more than its budget. Huge pages are requested, because weights are read from end to end.
//! What a buffer holds is not known here.

use std::io;

use memmap2::MmapMut;

/// Alignment of buffers and of direct reads into them, bytes: a multiple of every disk's block size and, on all but a few
/// machines, the size of a page.
pub const PAGE: usize = 4096;

/// Whole pages of this process's own memory.
#[derive(Debug)]
pub struct Buffer(MmapMut);

impl Buffer {
    /// `bytes` zeros, which take no memory until they are written. Dropping the buffer returns all of it to the system, on
    /// whichever thread; an allocator's arenas would keep it.
    pub fn new(bytes: usize) -> io::Result<Self> {
        let map = MmapMut::map_anon(bytes)?;
        #[cfg(target_os = "linux")]
        if let Err(error) = map.advise(memmap2::Advice::HugePage) {
            tracing::trace!("no huge pages: {error}");
        }
        Ok(Self(map))
    }

    #[inline]
    pub fn as_slice(&self) -> &[u8] {
        &self.0
    }

    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        &mut self.0
    }

    /// Its size, bytes.
    pub fn bytes(&self) -> u64 {
        self.0.len() as u64
    }
}

impl AsMut<[u8]> for Buffer {
    fn as_mut(&mut self) -> &mut [u8] {
        self.as_mut_slice()
    }
}

/// A pool of buffers.
#[derive(Debug)]
pub struct Buffers {
    budget: u64,
    lent: u64,
    free: Vec<Buffer>,
}

impl Buffers {
    /// At most `budget` bytes, lent and free together.
    pub fn new(budget: u64) -> Self {
        Self { budget, lent: 0, free: Vec::new() }
    }

    /// A buffer of exactly `bytes`, which together with all lent buffers must be within the budget.
    pub fn lend(&mut self, bytes: u64) -> io::Result<Buffer> {
        debug_assert!(self.lent + bytes <= self.budget, "the caller keeps within the budget");
        let found = self.free.iter().rposition(|buffer| buffer.bytes() == bytes);
        let buffer = match found {
            Some(index) => self.free.swap_remove(index),
            None => {
                let mut spare: u64 = self.free.iter().map(Buffer::bytes).sum();
                while self.lent + spare + bytes > self.budget {
                    let Some(buffer) = self.free.pop() else { break };
                    spare -= buffer.bytes();
                }
                Buffer::new(bytes as usize)?
            }
        };
        self.lent += bytes;
        Ok(buffer)
    }

    /// Takes back a lent buffer.
    pub fn take_back(&mut self, buffer: Buffer) {
        self.lent -= buffer.bytes();
        self.free.push(buffer);
        self.shrink();
    }

    /// Changes the budget. Free buffers beyond it go back to the system now, lent ones when they are taken back.
    pub fn set_budget(&mut self, budget: u64) {
        self.budget = budget;
        self.shrink();
    }

    fn shrink(&mut self) {
        let mut spare: u64 = self.free.iter().map(Buffer::bytes).sum();
        while self.lent + spare > self.budget {
            let Some(buffer) = self.free.pop() else { break };
            spare -= buffer.bytes();
        }
    }

    /// Bytes lent and free.
    pub fn bytes(&self) -> u64 {
        self.lent + self.free.iter().map(Buffer::bytes).sum::<u64>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BYTES: u64 = PAGE as u64;

    #[test]
    fn lent_and_free_stay_within_the_budget() {
        let mut buffers = Buffers::new(4 * BYTES);
        let small: Vec<_> = (0..4).map(|_| buffers.lend(BYTES).unwrap()).collect();
        assert_eq!(buffers.lent, 4 * BYTES);
        for buffer in small {
            buffers.take_back(buffer);
        }
        assert_eq!((buffers.lent, buffers.free.len()), (0, 4));
        let large = buffers.lend(3 * BYTES).unwrap();
        assert_eq!((large.bytes(), buffers.free.len()), (3 * BYTES, 1), "three small ones made room");
        buffers.take_back(large);
        assert_eq!(buffers.free.len(), 2);
    }

    #[test]
    fn a_smaller_budget_gives_memory_back() {
        let mut buffers = Buffers::new(3 * BYTES);
        let [a, b, c] = [0; 3].map(|_| buffers.lend(BYTES).unwrap());
        buffers.take_back(a);
        buffers.set_budget(BYTES);
        assert_eq!((buffers.bytes(), buffers.free.len()), (2 * BYTES, 0), "what is lent stays so");
        buffers.take_back(b);
        assert_eq!(buffers.bytes(), BYTES, "and goes when it comes back");
        buffers.take_back(c);
        assert_eq!((buffers.bytes(), buffers.free.len()), (BYTES, 1));
    }

    #[test]
    fn a_buffer_is_used_again() {
        let mut buffers = Buffers::new(2 * BYTES);
        let mut buffer = buffers.lend(BYTES).unwrap();
        buffer.as_mut_slice()[7] = 9;
        buffers.take_back(buffer);
        assert_eq!(buffers.lend(BYTES).unwrap().as_slice()[7], 9, "the same memory");
    }
}

//! The embedding table, of which a token reads one row.
//!
//! Owns [`Embedding`]: in memory, or left in its files, where a row costs one small read. The invariant: both give the
//! same values. The table is not mapped in the second case, because what is read of a mapped file stays in memory that
//! nobody counts, and a file that was cut short would end the process.

use std::{fs::File, path::PathBuf};

use coel_weights::{
    matrix::Matrix,
    memory::{FileRange, ReadError, WeightBytes},
    slices::{BASE_CELL, BLOCK_ROWS, GROUP, REFINE_CELL, Sliced, Weight},
};

/// Rows of token embeddings.
#[derive(Debug)]
pub enum Embedding {
    InMemory(Weight),
    OnDisk(Stored),
}

/// A matrix that stays in its files.
#[derive(Debug)]
pub struct Stored {
    cols: usize,
    form: Form,
}

#[derive(Debug)]
enum Form {
    Exact { dtype: coel_weights::matrix::DType, at: Region },
    Sliced { base: Region, refine: Option<Region> },
}

/// A part of an open file.
#[derive(Debug)]
struct Region {
    path: PathBuf,
    file: File,
    offset: u64,
}

impl Embedding {
    /// The same table, read from its files row by row.
    pub fn on_disk(weight: &Weight) -> Result<Self, ReadError> {
        let lost = || ReadError::NotInAFile { tensor: coel_weights::layout::EMBED.to_owned() };
        let region = |place: Option<FileRange<'_>>| Region::open(&place.ok_or_else(lost)?);
        let form = match weight {
            Weight::Exact(matrix) => Form::Exact { dtype: matrix.dtype(), at: region(matrix.place())? },
            Weight::Sliced(sliced) => {
                let (base, refine) = sliced.clone().into_slices();
                let refine = refine.map(|refine| region(refine.place())).transpose()?;
                Form::Sliced { base: region(base.place())?, refine }
            }
        };
        Ok(Self::OnDisk(Stored { cols: weight.cols(), form }))
    }

    /// Writes row `row` as f32 into `out` (one value a column).
    pub fn widen_row(&self, row: usize, out: &mut [f32]) -> Result<(), ReadError> {
        match self {
            Embedding::InMemory(weight) => weight.widen_row(row, out),
            Embedding::OnDisk(stored) => stored.widen_row(row, out)?,
        }
        Ok(())
    }
}

impl Stored {
    fn widen_row(&self, row: usize, out: &mut [f32]) -> Result<(), ReadError> {
        match &self.form {
            Form::Exact { dtype, at } => {
                let bytes = self.cols * dtype.size();
                let row = at.read(row as u64 * bytes as u64, bytes)?;
                Matrix::new(row, *dtype, 1, self.cols).expect("one row of them").widen_row(0, out);
            }
            Form::Sliced { base, refine } => {
                let (block, groups) = (row / BLOCK_ROWS, self.cols / GROUP);
                let read =
                    |region: &Region, cell: usize| region.read(block as u64 * (groups * cell) as u64, groups * cell);
                let refine = refine.as_ref().map(|refine| read(refine, REFINE_CELL)).transpose()?;
                let block = Sliced::new(BLOCK_ROWS, self.cols, read(base, BASE_CELL)?, refine);
                block.expect("the cells of one block").widen_row(row % BLOCK_ROWS, out);
            }
        }
        Ok(())
    }
}

impl Region {
    fn open(place: &FileRange<'_>) -> Result<Self, ReadError> {
        let failed = |error: std::io::Error| ReadError::Io { file: place.file.to_owned(), why: error.to_string() };
        let file = File::open(place.file).map_err(failed)?;
        // Without it a row would bring megabytes along. A file system that does not take the advice costs time only.
        #[cfg(target_os = "linux")]
        let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::Random);
        Ok(Self { path: place.file.to_owned(), file, offset: place.offset })
    }

    fn read(&self, at: u64, bytes: usize) -> Result<WeightBytes, ReadError> {
        let mut buffer = vec![0; bytes];
        let read = read_exact_at(&self.file, &mut buffer, self.offset + at);
        read.map_err(|error| ReadError::Io { file: self.path.clone(), why: error.to_string() })?;
        Ok(buffer.into())
    }
}

#[cfg(unix)]
fn read_exact_at(file: &File, into: &mut [u8], offset: u64) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, into, offset)
}

#[cfg(not(unix))]
fn read_exact_at(mut file: &File, into: &mut [u8], offset: u64) -> std::io::Result<()> {
    use std::io::{Read, Seek};
    file.seek(std::io::SeekFrom::Start(offset))?;
    file.read_exact(into)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use coel_weights::{folder::ModelFolder, layout::EMBED, slices::Precision};

    #[test]
    fn a_table_on_disk_has_the_same_rows() {
        let dir = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/fixture"));
        let folder = ModelFolder::open(dir).unwrap();
        let trunk = folder.trunk(Precision::Exact).unwrap();
        let sides = [folder.config().vocab_size, folder.config().hidden_size];
        let exact = trunk.weight(EMBED, sides).unwrap();
        let files = tempfile::tempdir().unwrap();
        let sliced = folder.trunk(Precision::Q8).unwrap().weight(EMBED, sides).unwrap();
        let Weight::Sliced(sliced) = sliced else { panic!("not sliced") };
        let (base, refine) = sliced.into_slices();
        let write = |name: &str, bytes: &WeightBytes| {
            let path = files.path().join(name);
            std::fs::write(&path, [&[0; 100][..], bytes.as_slice()].concat()).unwrap();
            WeightBytes::map(&path).unwrap().slice(100..100 + bytes.len()).unwrap()
        };
        let (base, refine) = (write("base", &base), write("refine", &refine.unwrap()));
        let slices = |refine| Weight::Sliced(Sliced::new(sides[0], sides[1], base.clone(), refine).unwrap());
        for weight in [exact, slices(None), slices(Some(refine))] {
            let stored = Embedding::on_disk(&weight).unwrap();
            for row in [0, 15, 16, 1000, sides[0] - 1] {
                let (mut here, mut there) = (vec![0.0; sides[1]], vec![1.0; sides[1]]);
                weight.widen_row(row, &mut here);
                stored.widen_row(row, &mut there).unwrap();
                assert_eq!(here, there, "row {row}");
            }
        }
    }
}

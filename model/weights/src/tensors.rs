//! Named tensors in safetensors bytes, whether a checkpoint's shard, a peer's blob or a reference file.
//!
//! Owns [`Tensors`]: names to typed, shaped ranges of [`WeightBytes`]. The invariant: every entry lies inside its
//! bytes and has exactly the length that its shape and type imply. One reader serves every source. Which tensors a model
//! needs is not known here but in `layout`.

use std::{
    collections::{BTreeMap, HashMap},
    ops::Range,
};

use safetensors::{Dtype, tensor::Metadata};

use crate::{
    error::LoadError,
    layout::{Pieces, TensorSpec},
    matrix::{DType, Matrix},
    memory::WeightBytes,
    slices::{
        FORMAT, FORMAT_KEY, PartBlobs, Precision, SLICE_KEY, Slice, SliceError, Sliced, Weight, encode::slice_matrix,
        is_sliced,
    },
};

/// Longest header accepted, bytes. It is far above any checkpoint's and checked before parsing.
pub const HEADER_BYTES_MAX: usize = 64 << 20;

/// Element types of a tensor: weights, cells of slices, or the integers a reference file holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ElementType {
    Weight(DType),
    Cells(Slice),
    I64,
}

impl ElementType {
    const fn size(self) -> usize {
        match self {
            ElementType::Weight(dtype) => dtype.size(),
            ElementType::Cells(_) => 1,
            ElementType::I64 => 8,
        }
    }
}

/// One tensor: type, shape, and the bytes in place.
#[derive(Clone, Debug)]
pub struct TensorView {
    pub element: ElementType,
    pub shape: Vec<usize>,
    pub bytes: WeightBytes,
    /// For the cells of a base slice: the cells of the refine slice, if present.
    pub refine: Option<WeightBytes>,
    /// Offset of `bytes` in the file or blob it came from.
    pub offset: u64,
    /// Index into [`Tensors::sources`].
    pub source: usize,
}

impl TensorView {
    /// Tells the system that this process will not read the tensor again soon: see [`WeightBytes::release`].
    pub fn release(&self) {
        self.bytes.release();
        self.refine.iter().for_each(WeightBytes::release);
    }

    /// Bytes of the tensor, the refine slice included.
    pub fn data_bytes(&self) -> u64 {
        (self.bytes.len() + self.refine.as_ref().map_or(0, WeightBytes::len)) as u64
    }
}

/// Tensors by name, from one or several sources.
#[derive(Clone, Debug, Default)]
pub struct Tensors {
    sources: Vec<String>,
    entries: BTreeMap<String, TensorView>,
}

impl Tensors {
    /// Reads the header of `bytes`, a whole safetensors file that messages call `source`.
    pub fn parse(bytes: WeightBytes, source: &str) -> Result<Self, LoadError> {
        Self::parse_pieces(&[bytes], source)
    }

    /// Like [`parse`](Self::parse), for a file in consecutive pieces. The first piece has the header, and each tensor lies in
    /// one piece. So tensors stay in the mapped files that hold them.
    pub fn parse_pieces(pieces: &[WeightBytes], source: &str) -> Result<Self, LoadError> {
        let file = || source.to_owned();
        let header = |why: String| LoadError::Header { file: file(), why };
        let found = pieces.iter().map(|piece| piece.len() as u64).sum::<u64>();
        let first = pieces.first().map_or(&[][..], WeightBytes::as_slice);
        let Some((prefix, rest)) = first.split_first_chunk::<8>() else {
            return Err(LoadError::Length { file: file(), expected: 8, found });
        };
        let header_bytes = u64::from_le_bytes(*prefix);
        if header_bytes > HEADER_BYTES_MAX as u64 {
            return Err(header(format!("it claims to be {header_bytes} bytes long")));
        }
        let Some(described) = rest.get(..header_bytes as usize) else {
            return Err(LoadError::Length { file: file(), expected: header_bytes + 8, found });
        };
        let start = 8 + described.len();
        let metadata: Metadata = serde_json::from_slice(described).map_err(|error| header(error.to_string()))?;
        let expected = (start as u64).saturating_add(metadata.data_len() as u64);
        if expected != found {
            return Err(LoadError::Length { file: file(), expected, found });
        }
        let slice = slice_of(metadata.metadata().as_ref().unwrap_or(&HashMap::new()), source)?;
        let mut entries = BTreeMap::new();
        for (name, info) in metadata.tensors() {
            let element = match info.dtype {
                Dtype::BF16 => ElementType::Weight(DType::BF16),
                Dtype::F16 => ElementType::Weight(DType::F16),
                Dtype::F32 => ElementType::Weight(DType::F32),
                Dtype::I64 => ElementType::I64,
                // Bytes that the metadata does not call cells are not weights.
                Dtype::U8 if slice.is_some_and(|slice| is_cells(&info.shape, slice)) => {
                    ElementType::Cells(slice.expect("seen just now"))
                }
                other => {
                    let (found, accepted) = (format!("{other:?}"), "BF16, F16 and F32");
                    return Err(LoadError::Type { file: file(), tensor: name, found, accepted });
                }
            };
            let range = start + info.data_offsets.0..start + info.data_offsets.1;
            let view = slice_of_pieces(pieces, range.clone()).filter(|view| {
                let elements = info.shape.iter().try_fold(1usize, |product, side| product.checked_mul(*side));
                elements.and_then(|elements| elements.checked_mul(element.size())) == Some(view.len())
            });
            let view = view.ok_or_else(|| header(format!("tensor {name} lies outside the file")))?;
            let (shape, offset) = (info.shape.clone(), range.start as u64);
            entries.insert(name, TensorView { element, shape, bytes: view, refine: None, offset, source: 0 });
        }
        Ok(Self { sources: vec![file()], entries })
    }

    /// Reads the blobs of a part, which messages call `source`.
    pub fn parse_part(blobs: PartBlobs, source: &str) -> Result<Self, LoadError> {
        let main = Self::parse(blobs.main, source)?;
        match blobs.refine {
            Some(refine) => main.with_refine(Self::parse(refine, &format!("{source}, refine slice"))?),
            None => Ok(main),
        }
    }

    /// Joins the cells of a base slice, `self`, with the cells of its refine slice. Both must have the same tensors of cells,
    /// with the same shapes.
    pub fn with_refine(mut self, refine: Tensors) -> Result<Self, LoadError> {
        let (base, file) = (self.sources.join(", "), refine.sources.join(", "));
        let mismatch = |why: String| LoadError::Refine { file: file.clone(), base: base.clone(), why };
        for (name, fine) in refine.entries {
            let Some(coarse) = self.entries.get_mut(&name) else {
                return Err(mismatch(format!("only the refine slice has tensor {name}")));
            };
            let pair = (coarse.element, fine.element);
            let cells = pair == (ElementType::Cells(Slice::Base), ElementType::Cells(Slice::Refine));
            if !cells || coarse.refine.is_some() || coarse.shape[..2] != fine.shape[..2] {
                return Err(mismatch(format!("tensor {name} has {:?} and {:?}", coarse.shape, fine.shape)));
            }
            coarse.refine = Some(fine.bytes);
        }
        let bare = |view: &TensorView| view.element == ElementType::Cells(Slice::Base) && view.refine.is_none();
        match self.entries.iter().find(|(_, view)| bare(view)) {
            Some((name, _)) => Err(mismatch(format!("it lacks tensor {name}"))),
            None => Ok(self),
        }
    }

    /// Joins the tensors of several sources; a name that two sources have is an error.
    pub fn merge(parts: impl IntoIterator<Item = Tensors>) -> Result<Self, LoadError> {
        let mut all = Self::default();
        for part in parts {
            let base = all.sources.len();
            all.sources.extend(part.sources);
            for (tensor, mut view) in part.entries {
                view.source += base;
                let file = all.sources[view.source].clone();
                if let Some(twin) = all.entries.get(&tensor) {
                    let other = all.sources[twin.source].clone();
                    return Err(LoadError::Duplicate { file, tensor, other });
                }
                all.entries.insert(tensor, view);
            }
        }
        Ok(all)
    }

    /// Replaces the tensor `whole`, if present, by the `pieces` that it consists of, in order.
    pub(crate) fn cut(&mut self, whole: &TensorSpec, pieces: Pieces<'_>) -> Result<(), LoadError> {
        let Some(view) = self.entries.get(&whole.name) else { return Ok(()) };
        let size = self.check(&whole.name, view, &whole.shape)?.size();
        let view = self.entries.remove(&whole.name).expect("seen above");
        let mut start = 0;
        for TensorSpec { name, shape } in pieces {
            let length = shape.iter().product::<usize>() * size;
            let bytes = view.bytes.slice(start..start + length).expect("the pieces make up the whole");
            let piece = TensorView { shape, bytes, offset: view.offset + start as u64, ..view.clone() };
            if let Some(twin) = self.entries.insert(name.clone(), piece) {
                let file = self.sources[view.source].clone();
                return Err(LoadError::Duplicate { file, tensor: name, other: self.sources[twin.source].clone() });
            }
            start += length;
        }
        Ok(())
    }

    /// The names of the files or blobs that the tensors came from.
    pub fn sources(&self) -> &[String] {
        &self.sources
    }

    pub fn get(&self, name: &str) -> Option<&TensorView> {
        self.entries.get(name)
    }

    pub fn iter(&self) -> impl Iterator<Item = (&str, &TensorView)> {
        self.entries.iter().map(|(name, view)| (name.as_str(), view))
    }

    pub fn len(&self) -> usize {
        self.entries.len()
    }

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Bytes of all tensors together.
    pub fn data_bytes(&self) -> u64 {
        self.entries.values().map(TensorView::data_bytes).sum()
    }

    /// Tells the system that this process will not read these tensors again soon: see [`WeightBytes::release`].
    pub fn release(&self) {
        self.entries.values().for_each(TensorView::release);
    }

    /// The lowest precision of these tensors.
    pub fn precision(&self) -> Precision {
        let each = self.entries.values().map(|view| match (view.element, &view.refine) {
            (ElementType::Cells(_), None) => Precision::Q4,
            (ElementType::Cells(_), Some(_)) => Precision::Q8,
            _ => Precision::Exact,
        });
        each.min().unwrap_or(Precision::Exact)
    }

    /// These tensors with their matrices sliced in memory; at [`Precision::Exact`], unchanged. Tensors that are sliced already
    /// stay as they are. Mapped matrices are released once they are read.
    pub fn sliced(mut self, precision: Precision) -> Result<Self, LoadError> {
        if precision == Precision::Exact {
            return Ok(self);
        }
        for (name, view) in &mut self.entries {
            let (ElementType::Weight(dtype), true) = (view.element, is_sliced(name, &view.shape)) else {
                continue;
            };
            let (rows, cols) = (view.shape[0], view.shape[1]);
            let failed = |source| LoadError::Slice { file: self.sources[view.source].clone(), source };
            let matrix = Matrix::new(view.bytes.clone(), dtype, rows, cols).expect("parse() checked the length");
            let sliced = slice_matrix(&matrix, precision)
                .ok_or_else(|| failed(SliceError::Columns { tensor: name.clone(), cols }))?
                .map_err(|error| failed(SliceError::at(name, 0, error)))?;
            view.bytes.release();
            view.element = ElementType::Cells(Slice::Base);
            view.shape = Slice::Base.shape(rows, cols).into();
            (view.bytes, view.refine) = sliced.into_slices();
        }
        Ok(self)
    }

    /// The same tensors in other memory: `put` takes each range of bytes, always in the same order, and returns where these
    /// bytes are now.
    pub fn moved<E>(&self, mut put: impl FnMut(&str, &WeightBytes) -> Result<WeightBytes, E>) -> Result<Self, E> {
        let mut moved = self.clone();
        for (name, view) in &mut moved.entries {
            view.bytes = put(name, &view.bytes)?;
            if let Some(refine) = &view.refine {
                view.refine = Some(put(name, refine)?);
            }
        }
        Ok(moved)
    }

    /// Keeps only the tensors named.
    pub fn select<'a>(&self, names: impl IntoIterator<Item = &'a str>) -> Self {
        let entries =
            names.into_iter().filter_map(|name| Some((name.to_owned(), self.entries.get(name)?.clone()))).collect();
        Self { sources: self.sources.clone(), entries }
    }

    /// The weight `name` with the given shape: `[rows, cols]`, or `[cols]` when `rows` is 1.
    pub fn matrix(&self, name: &str, shape: &[usize]) -> Result<Matrix, LoadError> {
        let view = self.entries.get(name).ok_or_else(|| self.missing(name))?;
        let dtype = self.check(name, view, shape)?;
        let (rows, cols) = match shape {
            [cols] => (1, *cols),
            [rows, cols] => (*rows, *cols),
            _ => unreachable!("the layout names vectors and matrices only"),
        };
        let matrix = Matrix::new(view.bytes.clone(), dtype, rows, cols);
        Ok(matrix.expect("parse() checked that bytes and shape agree"))
    }

    /// The matrix `name`, `[rows, cols]`, in whichever form it is held.
    pub fn weight(&self, name: &str, shape: [usize; 2]) -> Result<Weight, LoadError> {
        let view = self.entries.get(name).ok_or_else(|| self.missing(name))?;
        let ElementType::Cells(slice) = view.element else {
            return Ok(self.matrix(name, &shape)?.into());
        };
        let [rows, cols] = shape;
        let (file, tensor) = (self.sources[view.source].clone(), name.to_owned());
        if slice == Slice::Refine {
            return Err(LoadError::Refine {
                file,
                base: "any other blob".into(),
                why: "its base slice is missing".into(),
            });
        }
        let sliced = match view.shape == slice.shape(rows, cols) {
            true => Sliced::new(rows, cols, view.bytes.clone(), view.refine.clone()),
            false => None,
        };
        let (expected, found) = (slice.shape(rows, cols).to_vec(), view.shape.clone());
        sliced.map(Weight::Sliced).ok_or(LoadError::Shape { file, tensor, expected, found })
    }

    /// Refuses a tensor that has not the shape `shape` or is not a weight.
    pub(crate) fn check(&self, name: &str, view: &TensorView, shape: &[usize]) -> Result<DType, LoadError> {
        let ElementType::Weight(dtype) = view.element else {
            return Err(self.wrong_type(name, view, "BF16, F16 and F32"));
        };
        if view.shape != shape {
            let (file, tensor) = (self.sources[view.source].clone(), name.to_owned());
            let (expected, found) = (shape.to_vec(), view.shape.clone());
            return Err(LoadError::Shape { file, tensor, expected, found });
        }
        Ok(dtype)
    }

    pub(crate) fn missing(&self, name: &str) -> LoadError {
        LoadError::Missing { file: self.sources.join(", "), tensor: name.to_owned() }
    }

    /// The values of the f32 tensor `name`, with its shape.
    pub fn floats(&self, name: &str) -> Result<(Vec<usize>, Vec<f32>), LoadError> {
        let view = self.entries.get(name).ok_or_else(|| self.missing(name))?;
        let ElementType::Weight(dtype) = view.element else {
            return Err(self.wrong_type(name, view, "BF16, F16 and F32"));
        };
        let mut values = vec![0.0; view.bytes.len() / dtype.size()];
        dtype.widen(view.bytes.as_slice(), &mut values);
        Ok((view.shape.clone(), values))
    }

    /// The values of the i64 tensor `name`, with its shape.
    pub fn integers(&self, name: &str) -> Result<(Vec<usize>, Vec<i64>), LoadError> {
        let view = self.entries.get(name).ok_or_else(|| self.missing(name))?;
        if view.element != ElementType::I64 {
            return Err(self.wrong_type(name, view, "I64"));
        }
        let values = view.bytes.as_slice().as_chunks::<8>().0.iter().map(|raw| i64::from_le_bytes(*raw)).collect();
        Ok((view.shape.clone(), values))
    }

    fn wrong_type(&self, name: &str, view: &TensorView, accepted: &'static str) -> LoadError {
        LoadError::Type {
            file: self.sources[view.source].clone(),
            tensor: name.to_owned(),
            found: format!("{:?}", view.element),
            accepted,
        }
    }
}

fn is_cells(shape: &[usize], slice: Slice) -> bool {
    matches!(shape, [_, _, cell] if *cell == slice.cell())
}

/// Which slice a blob is, if it is one, according to its metadata.
fn slice_of(metadata: &HashMap<String, String>, file: &str) -> Result<Option<Slice>, LoadError> {
    let Some(name) = metadata.get(SLICE_KEY) else {
        return Ok(None);
    };
    let format = metadata.get(FORMAT_KEY).map_or("none", String::as_str);
    if format != FORMAT {
        return Err(LoadError::Format { file: file.to_owned(), found: format.to_owned() });
    }
    match Slice::ALL.into_iter().find(|slice| slice.name() == name) {
        Some(slice) => Ok(Some(slice)),
        None => Err(LoadError::Header { file: file.to_owned(), why: format!("{name:?} names no slice") }),
    }
}

/// The bytes `range` of consecutive pieces, if one piece has all of them.
fn slice_of_pieces(pieces: &[WeightBytes], range: Range<usize>) -> Option<WeightBytes> {
    let mut start = 0;
    pieces.iter().find_map(|piece| {
        let from = range.start.checked_sub(start);
        start += piece.len();
        from.and_then(|from| piece.slice(from..from + range.len()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(header: &str, data: &[u8]) -> WeightBytes {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes.extend_from_slice(data);
        bytes.into()
    }

    #[track_caller]
    fn check_refused(bytes: WeightBytes, words: &[&str]) {
        let message = Tensors::parse(bytes, "blob-7").unwrap_err().to_string();
        for word in ["blob-7"].iter().chain(words) {
            assert!(message.contains(word), "{message:?} does not name {word:?}");
        }
    }

    #[test]
    fn a_strangers_bytes_are_refused_not_trusted() {
        check_refused(vec![1, 2, 3].into(), &["truncated", "8 bytes"]);
        check_refused(u64::MAX.to_le_bytes().to_vec().into(), &["malformed"]);
        check_refused(100u64.to_le_bytes().to_vec().into(), &["truncated"]);
        check_refused(file("not json", &[]), &["malformed"]);
        check_refused(file(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}"#, &[0; 4]), &["malformed"]);
        check_refused(file(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, &[0; 4]), &["truncated"]);
        check_refused(file(r#"{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}"#, &[0; 2]), &["tensor a", "U8"]);
        let huge = r#"{"a":{"dtype":"F32","shape":[18446744073709551615,4],"data_offsets":[0,8]}}"#;
        check_refused(file(huge, &[0; 8]), &["malformed"]);
    }

    #[test]
    fn merging_refuses_duplicates() {
        let one =
            || Tensors::parse(file(r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#, &[0; 4]), "x").unwrap();
        let twins = Tensors::merge([one(), one()]).unwrap_err();
        assert!(matches!(twins, LoadError::Duplicate { .. }), "{twins}");
    }
}

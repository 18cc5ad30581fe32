//! The encoding is pinned, and everything that is not a sound manifest is refused by name.

use super::*;
use proptest::prelude::*;

fn sample() -> Manifest {
    let blob = |text: &str| BlobEntry::of(text.as_bytes());
    Manifest {
        format: FORMAT,
        architecture: "Qwen2MoeForCausalLM".into(),
        files: vec![
            FileEntry { name: "config.json".into(), blob: blob("{}") },
            FileEntry { name: "tokenizer.json".into(), blob: blob("tokens") },
        ],
        trunk: vec![PartEntry { name: "embeddings".into(), slices: Slices::exact_only(blob("trunk")) }],
        experts: BTreeMap::from([
            (ExpertId::new(0, 0), Slices::exact_only(blob("first"))),
            (ExpertId::new(0, 1), Slices { exact: blob("second!"), base: Some(blob("2nd")), refine: Some(blob("!")) }),
        ]),
    }
}

#[test]
fn the_encoding_is_pinned() {
    let (bytes, id) = sample().encode().unwrap();
    assert_eq!(bytes.len(), 803);
    assert_eq!(id.to_string(), "f9a91549be6b36188e3f9df4706a63dba73ba69012ab4874c02452041bed7f4a");
    assert_eq!(Manifest::decode(&bytes), Ok(sample()));
    assert_eq!(Manifest::decode_as(&bytes, id), Ok(sample()));
    let other = ModelId([0; 32]);
    assert_eq!(Manifest::decode_as(&bytes, other), Err(ManifestError::OtherModel { wanted: other, got: id }));
}

#[test]
fn sizes_add_up() {
    let manifest = sample();
    let trunk = Precision::ALL.map(|precision| manifest.trunk_bytes(precision));
    assert_eq!(trunk, [5; 3], "no part of the trunk has slices");
    assert_eq!(Precision::ALL.map(|precision| manifest.experts_bytes(precision)), [5 + 3, 5 + 4, 5 + 7]);
    assert_eq!(manifest.total_bytes(), 2 + 6 + 5 + 5 + 7 + 3 + 1);
    let slices = &manifest.experts[&ExpertId::new(0, 1)];
    assert_eq!(Precision::ALL.map(|precision| slices.bytes(precision)), [Some(3), Some(4), Some(7)]);
    for (slice, _) in slices.at(Precision::Q8).unwrap() {
        assert!(slice.is_part_of(Precision::Q8) && !slice.is_part_of(Precision::Exact));
        assert_eq!(slice.is_part_of(Precision::Q4), slice == Slice::Base, "what raises from Q4 is the refine slice");
    }
    let whole = |precision| slices.at(precision).unwrap().iter().map(|(_, blob)| blob.bytes).collect::<Vec<_>>();
    assert_eq!((whole(Precision::Q8), whole(Precision::Exact)), (vec![3, 1], vec![7]));
    assert_eq!(manifest.file("config.json").map(|blob| blob.bytes), Some(2));
    let id = BlobId::of(b"second!");
    assert_eq!(manifest.blob(&id).map(|blob| blob.id), Some(id));
}

#[test]
fn hashing_does_not_depend_on_how_the_content_arrives() {
    let content: Vec<u8> = (0..2 * CHUNK_BYTES + 12_345).map(|i| (i % 251) as u8).collect();
    let whole = BlobEntry::of(&content);
    let mut hasher = BlobHasher::new();
    for piece in content.chunks(99_991) {
        hasher.update(piece);
    }
    assert_eq!(hasher.finish(), whole);
    assert_eq!(whole.id, BlobId::of(&content));
    assert_eq!(whole.chunks.len(), 3);
    assert_eq!(whole.chunk_bytes(2), Some(12_345));
    assert_eq!(whole.chunk_bytes(3), None);
    assert!(whole.chunk_matches(1, &content[CHUNK_BYTES..2 * CHUNK_BYTES]));
    assert!(!whole.chunk_matches(0, &content[1..=CHUNK_BYTES]));
    whole.check().unwrap();
    let exact = BlobEntry::of(&content[..CHUNK_BYTES]);
    assert_eq!((exact.chunks.len(), exact.chunk_bytes(0), exact.chunk_bytes(1)), (1, Some(CHUNK_BYTES), None));
    exact.check().unwrap();
    let empty = BlobEntry::of(&[]);
    assert_eq!((empty.chunks.len(), empty.bytes), (0, 0));
    empty.check().unwrap();
}

/// The message with which the changed sample is refused.
#[track_caller]
fn refused(change: impl FnOnce(&mut Manifest)) -> String {
    let mut manifest = sample();
    change(&mut manifest);
    let message = manifest.check().unwrap_err().to_string();
    let bytes = cbor::to_vec(&manifest).unwrap();
    assert_eq!(Manifest::decode(&bytes).unwrap_err().to_string(), message);
    message
}

#[test]
fn what_contradicts_itself_is_refused_by_name() {
    assert!(refused(|m| m.format = 7).contains("format 7"));
    for name in ["../config.json", "a/b", "a\\b", "..", "", "nul\0"] {
        assert!(refused(|m| m.files[0].name = name.into()).contains("not a name"), "{name}");
    }
    assert!(refused(|m| m.files[1].name = "config.json".into()).contains("listed twice"));
    assert!(refused(|m| m.trunk[0].slices.exact.bytes = 2 << 20).contains("2 chunks, but 1 hashes"));
    assert!(refused(|m| m.trunk[0].slices.exact.bytes = u64::MAX).contains("more than"));
    assert!(refused(|m| m.trunk[0].slices.exact.chunks.clear()).contains("1 chunks, but 0 hashes"));
    assert!(refused(|m| m.trunk[0].slices.exact.id = BlobId([1; 32])).contains("another hash"));
    let torn = |m: &mut Manifest| m.experts.get_mut(&ExpertId::new(0, 1)).unwrap().refine = None;
    assert!(refused(torn).contains("but not both"));
    assert!(refused(|m| m.architecture = "x".repeat(300)).contains("not a name"));
}

#[test]
fn another_spelling_of_the_same_manifest_is_refused() {
    let (bytes, _) = sample().encode().unwrap();
    // The first field's value, 3, spelled in two bytes instead of one.
    let at = bytes.windows(7).position(|w| w == b"format\x03").unwrap() + 6;
    let mut longer = bytes.clone();
    longer.splice(at..=at, [0x18, 0x03]);
    let message = Manifest::decode(&longer).unwrap_err().to_string();
    assert!(message.contains("canonical"), "{message}");
    let mut trailing = bytes;
    trailing.push(0);
    assert!(Manifest::decode(&trailing).is_err());
}

proptest! {
    #[test]
    fn strange_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        prop_assert!(Manifest::decode(&bytes).is_err());
    }

    #[test]
    fn damaged_manifests_are_another_model_or_none(at in any::<prop::sample::Index>(), flip in 1u8..) {
        let (mut bytes, id) = sample().encode().unwrap();
        let at = at.index(bytes.len());
        bytes[at] ^= flip;
        prop_assert!(Manifest::decode_as(&bytes, id).is_err());
        if let Ok(manifest) = Manifest::decode(&bytes) {
            prop_assert_ne!(manifest, sample());
        }
    }
}

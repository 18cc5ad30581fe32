//! Blobs on a real disk: kept, referenced, resumed, damaged.

use super::error::io;
use super::*;
use crate::disk::{OpenError, Room, WEIGHTS_RESERVE_BYTES};
use crate::ids::BlobId;
use crate::manifest::{BlobEntry, CHUNK_BYTES, Slices};
use std::fs;
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;

/// Content that differs from chunk to chunk.
fn content(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|i| (i / 7 + i / CHUNK_BYTES * 13) as u8).collect()
}

fn fresh() -> (tempfile::TempDir, Blobs) {
    let dir = tempfile::tempdir().unwrap();
    let blobs = Blobs::open(dir.path()).unwrap();
    (dir, blobs)
}

fn piece(content: &[u8], chunk: u32) -> &[u8] {
    let start = chunk as usize * CHUNK_BYTES;
    &content[start..content.len().min(start + CHUNK_BYTES)]
}

fn overwrite(path: &Path, at: u64, bytes: &[u8]) {
    let mut file = fs::File::options().write(true).open(path).unwrap();
    file.seek(SeekFrom::Start(at)).unwrap();
    file.write_all(bytes).unwrap();
}

#[test]
fn what_is_put_is_there_after_a_restart() {
    let (dir, blobs) = fresh();
    let long = content(2 * CHUNK_BYTES + 777);
    let entry = blobs.put(&long).unwrap();
    let empty = blobs.put(&[]).unwrap();
    assert_eq!(blobs.put(&long).unwrap(), entry, "the same content again is the same blob");
    assert!(matches!(Blobs::open(dir.path()), Err(BlobError::Open(OpenError::InUse { .. }))));
    drop(blobs);
    let blobs = Blobs::open(dir.path()).unwrap();
    assert!(blobs.has(&entry.id) && blobs.has(&empty.id) && !blobs.has(&BlobId([0; 32])));
    assert_eq!(blobs.read_verified(&entry).unwrap(), long);
    assert_eq!(blobs.read_verified(&empty).unwrap(), []);
    assert_eq!(blobs.read_chunk(&entry.id, 2).unwrap(), piece(&long, 2));
    assert!(matches!(blobs.read_chunk(&entry.id, 3), Err(BlobError::NoSuchChunk { chunk: 3, .. })));
    assert!(matches!(blobs.read_chunk(&BlobId([0; 32]), 0), Err(BlobError::Missing { .. })));
    let mut held = vec![(entry.id, entry.bytes), (empty.id, 0)];
    held.sort();
    assert_eq!(blobs.list().unwrap(), held);
    assert!(blobs.remove(&entry.id).unwrap() && !blobs.remove(&entry.id).unwrap());
    assert!(!blobs.has(&entry.id));
    assert_eq!(blobs.list().unwrap(), [(empty.id, 0)]);
}

#[test]
fn a_damaged_index_is_set_aside_and_made_anew_from_the_files() {
    let (dir, blobs) = fresh();
    let (long, short) = (content(2 * CHUNK_BYTES + 777), content(9));
    let entries = [blobs.put(&long).unwrap(), blobs.put(&short).unwrap()];
    let mut partial = blobs.receive(&BlobEntry::of(&content(CHUNK_BYTES + 1))).unwrap();
    partial.write(1, &content(CHUNK_BYTES + 1)[CHUNK_BYTES..]).unwrap();
    drop(partial);
    let (listed, usage) = (blobs.list().unwrap(), blobs.usage());
    drop(blobs);
    let database = dir.path().join("index/db");
    fs::File::options()
        .write(true)
        .open(&database)
        .unwrap()
        .set_len(fs::metadata(&database).unwrap().len() / 2)
        .unwrap();
    let blobs = Blobs::open(dir.path()).unwrap();
    assert!(dir.path().join("damaged-index/db").is_file());
    assert_eq!((blobs.list().unwrap(), blobs.usage()), (listed, usage));
    assert_eq!(entries.each_ref().map(|entry| blobs.read_verified(entry).unwrap()), [long, short]);
}

#[test]
fn a_receipt_goes_on_where_it_ended() {
    let (dir, blobs) = fresh();
    let long = content(4 * CHUNK_BYTES + 5);
    let entry = BlobEntry::of(&long);
    let mut partial = blobs.receive(&entry).unwrap();
    assert_eq!(partial.missing(), [0, 1, 2, 3, 4]);
    assert!(matches!(blobs.receive(&entry), Err(BlobError::Busy { .. })));
    partial.write(3, piece(&long, 3)).unwrap();
    partial.write(0, piece(&long, 0)).unwrap();
    assert_eq!(partial.bytes_held(), 2 << 20);
    assert!(matches!(blobs.read_verified(&entry), Err(BlobError::Missing { .. })));
    drop(partial);
    drop(blobs);

    // A crash in the middle of chunk 1 left half of it.
    overwrite(&dir.path().join("partial").join(entry.id.to_string()), 1 << 20, &piece(&long, 1)[..5_000]);
    let blobs = Blobs::open(dir.path()).unwrap();
    let mut partial = blobs.receive(&entry).unwrap();
    assert_eq!(partial.missing(), [1, 2, 4]);
    for chunk in [4, 1] {
        partial.write(chunk, piece(&long, chunk)).unwrap();
    }
    assert!(matches!(partial.finish(), Err(BlobError::Incomplete { missing: 1, .. })));
    let mut partial = blobs.receive(&entry).unwrap();
    assert_eq!(partial.missing(), [2]);
    partial.write(2, piece(&long, 2)).unwrap();
    partial.finish().unwrap();
    assert_eq!(blobs.read_verified(&entry).unwrap(), long);
    assert!(matches!(blobs.receive(&entry), Err(BlobError::Held { .. })));
    assert!(!dir.path().join("partial").join(entry.id.to_string()).exists());
}

#[test]
fn bytes_from_a_peer_count_only_if_they_match() {
    let (_dir, blobs) = fresh();
    let long = content(CHUNK_BYTES + 100);
    let entry = BlobEntry::of(&long);
    let mut partial = blobs.receive(&entry).unwrap();
    let mut flipped = piece(&long, 1).to_vec();
    flipped[50] ^= 4;
    assert!(matches!(partial.write(1, &flipped), Err(BlobError::Corrupt { chunk: 1, .. })));
    assert!(matches!(partial.write(1, &flipped[..99]), Err(BlobError::Corrupt { chunk: 1, .. })));
    assert!(matches!(partial.write(0, piece(&long, 1)), Err(BlobError::Corrupt { chunk: 0, .. })));
    assert!(matches!(partial.write(2, &[]), Err(BlobError::NoSuchChunk { chunk: 2, .. })));
    assert_eq!(partial.missing(), [0, 1]);
}

#[test]
fn chunks_that_do_not_make_the_blob_never_get_its_name() {
    let (dir, blobs) = fresh();
    let long = content(2 * CHUNK_BYTES);
    let entry = BlobEntry { id: BlobId([7; 32]), ..BlobEntry::of(&long) };
    let mut partial = blobs.receive(&entry).unwrap();
    for chunk in partial.missing() {
        partial.write(chunk, piece(&long, chunk)).unwrap();
    }
    assert!(matches!(partial.finish(), Err(BlobError::OtherContent { .. })));
    assert!(!blobs.has(&entry.id));
    assert_eq!(fs::read_dir(dir.path().join("partial")).unwrap().count(), 0);
    let lies = BlobEntry { bytes: u64::MAX, ..BlobEntry::of(&long) };
    assert!(matches!(blobs.receive(&lies), Err(BlobError::Entry(_))));
    assert!(matches!(blobs.read_verified(&lies), Err(BlobError::Entry(_))));
}

#[test]
fn a_flipped_bit_is_found_and_named() {
    let (_dir, blobs) = fresh();
    let long = content(3 * CHUNK_BYTES);
    let entry = blobs.put(&long).unwrap();
    let path = blobs.path(&entry.id);
    let at = CHUNK_BYTES + 4711;
    overwrite(&path, at as u64, &[long[at] ^ 1]);
    for error in [blobs.read_verified(&entry).unwrap_err(), blobs.verify(&entry).unwrap_err()] {
        let message = error.to_string();
        assert!(matches!(error, BlobError::Corrupt { id, chunk: 1, .. } if id == entry.id), "{message}");
        assert!(message.contains(&path.display().to_string()), "{message}");
        assert!(error.is_damage());
    }
    assert!(blobs.read_chunk(&entry.id, 1).is_ok(), "raw reads leave the check to the peer");
}

#[test]
fn a_truncated_file_is_named() {
    let (_dir, blobs) = fresh();
    let long = content(2 * CHUNK_BYTES);
    let entry = blobs.put(&long).unwrap();
    let path = blobs.path(&entry.id);
    fs::File::options().write(true).open(&path).unwrap().set_len(CHUNK_BYTES as u64 + 9).unwrap();
    assert!(!blobs.has(&entry.id));
    for error in [
        blobs.read_verified(&entry).unwrap_err(),
        blobs.verify(&entry).unwrap_err(),
        blobs.read_chunk(&entry.id, 1).unwrap_err(),
    ] {
        assert!(matches!(error, BlobError::Truncated { found: 1_048_585, .. }), "{error}");
    }
    // What is left of it is not fetched again.
    let partial = blobs.receive(&entry).unwrap();
    assert_eq!(partial.missing(), [1]);
    drop(partial);
    fs::remove_file(blobs.partial_path(&entry.id)).unwrap();
    assert!(matches!(blobs.read_verified(&entry), Err(BlobError::Truncated { found: 0, .. })));
}

#[test]
fn a_checkpoint_is_referenced_in_place() {
    let (dir, blobs) = fresh();
    let checkpoint = dir.path().join("model.safetensors");
    let file = content(3 * CHUNK_BYTES);
    fs::write(&checkpoint, &file).unwrap();
    let range = |offset: usize, bytes: usize| Segment::File {
        path: checkpoint.clone(),
        offset: offset as u64,
        bytes: bytes as u64,
    };
    let whole = [b"header".as_slice(), &file[100..1_200_000], b"", &file[2_000_000..2_900_000]].concat();
    let entry = BlobEntry::of(&whole);
    let segments = vec![
        Segment::Inline(b"header".to_vec()),
        range(100, 1_199_900),
        Segment::Inline(vec![]),
        range(2_000_000, 900_000),
    ];
    let refer = |entry: &BlobEntry, segments| {
        blobs.keep(vec![NewPart { key: [0; 32], exact: (entry.clone(), segments), slices: NewSlices::None }])
    };
    refer(&entry, segments.clone()).unwrap();
    assert_eq!(blobs.read_verified(&entry).unwrap(), whole);
    for chunk in 0..entry.chunks.len() as u32 {
        assert_eq!(blobs.read_chunk(&entry.id, chunk).unwrap(), piece(&whole, chunk));
    }
    assert_eq!(fs::read_dir(dir.path().join("blobs")).unwrap().count(), 0, "nothing was copied");

    let short = refer(&entry, segments[..2].to_vec());
    assert!(matches!(short, Err(BlobError::Reference { .. })));
    let beyond = refer(&BlobEntry::of(&file), vec![range(1, 3 * CHUNK_BYTES)]);
    assert!(matches!(beyond, Err(BlobError::Truncated { .. })));

    // The checkpoint changes under the reference.
    overwrite(&checkpoint, 2_000_000, &[file[2_000_000] ^ 0x80]);
    let error = blobs.read_verified(&entry).unwrap_err();
    assert!(error.is_source_changed() && error.is_damage(), "{error}");
    assert!(error.to_string().contains("model.safetensors has other bytes"), "{error}");
    // It is gone, and comes back.
    fs::remove_file(&checkpoint).unwrap();
    assert!(!blobs.has(&entry.id));
    let error = blobs.read_verified(&entry).unwrap_err().to_string();
    assert!(error.contains("model.safetensors is not there") && error.contains("coel model import"), "{error}");
    fs::write(&checkpoint, &file).unwrap();
    blobs.verify(&entry).unwrap();

    // A good copy may be fetched while the checkpoint is no good, and then takes its place.
    fs::write(&checkpoint, &file[..2_500_000]).unwrap();
    let mut partial = blobs.receive(&entry).unwrap();
    for chunk in partial.missing() {
        partial.write(chunk, piece(&whole, chunk)).unwrap();
    }
    partial.finish().unwrap();
    assert_eq!(blobs.read_verified(&entry).unwrap(), whole);
}

#[test]
fn a_blob_is_read_into_the_memory_it_is_given() {
    let (_dir, blobs) = fresh();
    for whole in [content(2 * CHUNK_BYTES + 9), content(5), content(CHUNK_BYTES), Vec::new()] {
        let entry = blobs.put(&whole).unwrap();
        let read = blobs.read_verified_into(&entry, |bytes| Ok(vec![7; bytes + 3])).unwrap();
        assert_eq!((&read[..whole.len()], &read[whole.len()..]), (&whole[..], &[7, 7, 7][..]));
        blobs.verify(&entry).unwrap();
        let refused = blobs.read_verified_into(&entry, |_| Err::<Vec<u8>, _>(std::io::ErrorKind::OutOfMemory.into()));
        assert!(matches!(refused, Err(BlobError::Io { .. })));
    }
}

#[test]
fn what_an_import_kept_is_found_again() {
    let (dir, blobs) = fresh();
    let checkpoint = dir.path().join("model.safetensors");
    fs::write(&checkpoint, content(5_000)).unwrap();
    let slices = [content(CHUNK_BYTES + 9), content(77)];
    let part = |blobs: &Blobs, key: u8, slices: Option<[&[u8]; 2]>| {
        let drafts = slices.map(|slices| {
            slices.map(|slice| {
                let mut draft = blobs.draft().unwrap();
                slice.chunks(1_000).for_each(|piece| draft.write_all(piece).unwrap());
                draft
            })
        });
        let drafts = drafts.map_or(NewSlices::None, NewSlices::Made);
        let segments = vec![Segment::File { path: checkpoint.clone(), offset: 0, bytes: 5_000 }];
        NewPart { key: [key; 32], exact: (BlobEntry::of(&content(5_000)), segments), slices: drafts }
    };
    let with_slices = part(&blobs, 1, Some([&slices[0], &slices[1]]));
    let kept = blobs.keep(vec![with_slices, part(&blobs, 2, None)]).unwrap();
    assert_eq!(kept[0].base, Some(BlobEntry::of(&slices[0])));
    assert_eq!(kept[1], Slices::exact_only(BlobEntry::of(&content(5_000))));
    assert_eq!(blobs.read_verified(kept[0].refine.as_ref().unwrap()).unwrap(), slices[1]);
    drop(blobs);

    // A crash left a draft behind, which is nobody's.
    fs::write(dir.path().join("partial/draft-3"), b"half").unwrap();
    let blobs = Blobs::open(dir.path()).unwrap();
    let unfinished = || fs::read_dir(dir.path().join("partial")).unwrap().count();
    assert_eq!(unfinished(), 0);
    assert_eq!(blobs.noted(&[1; 32]).unwrap(), Some(kept[0].clone()));
    assert_eq!(blobs.noted(&[9; 32]).unwrap(), None);
    drop(part(&blobs, 3, Some([&slices[0], &slices[1]])));
    assert_eq!((unfinished(), blobs.noted(&[3; 32]).unwrap()), (0, None), "a part that was given up leaves nothing");

    // One of its blobs is gone: it has to be made again.
    fs::remove_file(blobs.path(&kept[0].base.as_ref().unwrap().id)).unwrap();
    assert_eq!(blobs.noted(&[1; 32]).unwrap(), None);
    assert_eq!(blobs.noted(&[2; 32]).unwrap(), Some(kept[1].clone()));
    let again = blobs.keep(vec![part(&blobs, 1, Some([&slices[0], &slices[1]]))]).unwrap();
    assert_eq!((&again[0], blobs.noted(&[1; 32]).unwrap()), (&kept[0], Some(kept[0].clone())));
    fs::File::options().write(true).open(&checkpoint).unwrap().set_len(4_999).unwrap();
    assert_eq!(blobs.noted(&[2; 32]).unwrap(), None, "the checkpoint was cut short");
}

#[test]
fn a_blob_that_lost_its_place_in_the_index_is_looked_at_again() {
    let (_dir, blobs) = fresh();
    let long = content(CHUNK_BYTES + 1);
    let entry = blobs.put(&long).unwrap();
    let path = blobs.path(&entry.id);
    let saved = fs::read(&path).unwrap();
    blobs.remove(&entry.id).unwrap();
    fs::write(&path, saved).unwrap();
    let partial = blobs.receive(&entry).unwrap();
    assert_eq!(partial.missing(), Vec::<u32>::new());
    partial.finish().unwrap();
    assert_eq!(blobs.read_verified(&entry).unwrap(), long);
}

#[test]
fn many_threads_may_read_and_receive_at_once() {
    let (_dir, blobs) = fresh();
    let shared = blobs.put(&content(CHUNK_BYTES * 2)).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4u8 {
            let (blobs, shared) = (blobs.clone(), &shared);
            scope.spawn(move || {
                for round in 0..5u8 {
                    let mine = blobs.put(&[&[thread, round], content(9_000).as_slice()].concat()).unwrap();
                    assert!(blobs.read_verified(&mine).is_ok() && blobs.verify(shared).is_ok());
                }
            });
        }
    });
    assert_eq!(blobs.list().unwrap().len(), 21);
}

/// A store of 10 MiB and a bit.
const BUDGET: u64 = 10 * (1 << 20) + 100;

fn within(dir: &Path) -> Blobs {
    Blobs::open_within(dir, Some(BUDGET)).unwrap()
}

#[test]
fn the_budget_is_never_passed_and_both_numbers_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let blobs = within(dir.path());
    let first = blobs.put(&content(6 * CHUNK_BYTES)).unwrap();
    let error = blobs.put(&content(5 * CHUNK_BYTES)).unwrap_err();
    assert!(
        matches!(error, BlobError::OverBudget { wanted_bytes, used_bytes, budget_bytes }
        if (wanted_bytes, used_bytes, budget_bytes) == (5 << 20, 6 << 20, BUDGET)),
        "{error}"
    );
    let words = error.to_string();
    assert!(words.contains(&BUDGET.to_string()) && words.contains(&(5 << 20).to_string()), "{words}");
    assert_eq!(blobs.usage().room_bytes(), Some(BUDGET - (6 << 20)));

    // What is on its way counts whole, so that two that do not fit together are not both begun.
    let (three, two) = (BlobEntry::of(&content(3 * CHUNK_BYTES)), BlobEntry::of(&content(2 * CHUNK_BYTES)));
    let mut partial = blobs.receive(&three).unwrap();
    assert!(blobs.receive(&two).unwrap_err().is_over_budget());
    partial.write(0, piece(&content(3 * CHUNK_BYTES), 0)).unwrap();
    assert!(matches!(blobs.discard(&three.id), Err(BlobError::Busy { .. })));
    drop(partial);
    assert_eq!(blobs.usage().used_bytes, 7 << 20, "what has arrived stays for the next attempt");
    blobs.put(&content(2 * CHUNK_BYTES)).unwrap();
    assert_eq!(blobs.usage().used_bytes, 9 << 20);
    let mut files = vec![(first.id, 6 << 20), (three.id, 1 << 20), (two.id, 2 << 20)];
    files.sort();
    assert_eq!(blobs.files().unwrap(), files);

    // The same count after a restart; room is made by giving something up.
    drop(blobs);
    let blobs = within(dir.path());
    assert_eq!((blobs.usage().used_bytes, blobs.files().unwrap()), (9 << 20, files));
    blobs.discard(&three.id).unwrap();
    blobs.discard(&first.id).unwrap();
    assert!(!blobs.has(&first.id) && blobs.has(&two.id));
    assert_eq!(blobs.usage().used_bytes, 2 << 20);
    blobs.put(&content(5 * CHUNK_BYTES)).unwrap();

    // A budget that became smaller keeps what there is, and takes nothing more.
    drop(blobs);
    let blobs = Blobs::open_within(dir.path(), Some(1 << 20)).unwrap();
    assert!(blobs.has(&two.id));
    assert_eq!((blobs.usage().used_bytes, blobs.usage().room_bytes()), (7 << 20, Some(0)));
    assert!(blobs.put(b"more").unwrap_err().is_over_budget());
    assert_eq!(blobs.put(&[]).unwrap().bytes, 0);
}

#[test]
fn drafts_count_as_they_are_written_and_references_do_not() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = dir.path().join("model.safetensors");
    fs::write(&checkpoint, content(20 * CHUNK_BYTES)).unwrap();
    let blobs = within(dir.path());
    let draft = |bytes: usize| {
        let mut draft = blobs.draft().unwrap();
        draft.write_all(&content(bytes)).and_then(|()| draft.flush()).map(|()| draft)
    };
    let exact = BlobEntry::of(&content(20 * CHUNK_BYTES));
    let segments = vec![Segment::File { path: checkpoint, offset: 0, bytes: exact.bytes }];
    let slices = [draft(3 * CHUNK_BYTES).unwrap(), draft(77).unwrap()];
    blobs
        .keep(vec![NewPart { key: [1; 32], exact: (exact.clone(), segments), slices: NewSlices::Made(slices) }])
        .unwrap();
    assert_eq!(blobs.usage().used_bytes, (3 << 20) + 77);
    assert!(blobs.has(&exact.id), "it is held, though it is larger than the budget");

    // The same content again takes the place of the first.
    let again = [draft(3 * CHUNK_BYTES).unwrap(), draft(77).unwrap()];
    let part = NewPart { key: [2; 32], exact: (BlobEntry::of(&[]), Vec::new()), slices: NewSlices::Made(again) };
    blobs.keep(vec![part]).unwrap();
    assert_eq!(blobs.usage().used_bytes, (3 << 20) + 77);

    let error = draft(9 * CHUNK_BYTES).map(drop).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::QuotaExceeded);
    assert!(io(dir.path())(error).is_over_budget());
    let mut unfinished = blobs.draft().unwrap();
    unfinished.write_all(&[1; 10]).unwrap();
    drop(unfinished);
    assert_eq!(blobs.usage().used_bytes, (3 << 20) + 77, "what was given up is not counted");
}

#[test]
fn an_import_over_fetched_blobs_keeps_them_once() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = dir.path().join("model.safetensors");
    let exact = content(2 * CHUNK_BYTES + 5);
    fs::write(&checkpoint, &exact).unwrap();
    let blobs = within(dir.path());
    // As they came from a peer.
    let (fetched, base) = (blobs.put(&exact).unwrap(), blobs.put(&content(77)).unwrap());
    let refine = blobs.put(&content(78)).unwrap();
    let before = blobs.usage();
    let import = |key: u8, slices| {
        let segments = vec![Segment::File { path: checkpoint.clone(), offset: 0, bytes: fetched.bytes }];
        blobs
            .keep(vec![NewPart { key: [key; 32], exact: (fetched.clone(), segments), slices }])
            .map(|mut kept| kept.remove(0))
    };
    let kept = import(1, NewSlices::Held([base.clone(), refine.clone()])).unwrap();
    assert_eq!((kept.base, kept.refine), (Some(base.clone()), Some(refine.clone())));
    assert_eq!(blobs.usage(), before);
    assert!(
        matches!(&blobs.lies_in(&fetched).unwrap()[..], [Segment::File { path, .. }] if *path == blobs.path(&fetched.id))
    );
    let away = dir.path().join("away");
    fs::rename(&checkpoint, &away).unwrap();
    assert_eq!(blobs.read_verified(&fetched).unwrap(), exact, "it lies here whatever becomes of the checkpoint");
    fs::rename(&away, &checkpoint).unwrap();

    // A fetched copy that is damaged gives its room back to what is good.
    overwrite(&blobs.path(&fetched.id), 9, &[exact[9] ^ 1]);
    import(2, NewSlices::Held([base.clone(), refine.clone()])).unwrap();
    assert_eq!(blobs.usage().used_bytes, before.used_bytes - fetched.bytes);
    assert_eq!(blobs.read_verified(&fetched).unwrap(), exact);
    assert!(!blobs.path(&fetched.id).exists());

    // What is said to be held has to be.
    blobs.remove(&refine.id).unwrap();
    assert!(matches!(import(3, NewSlices::Held([base, refine])), Err(BlobError::Missing { .. })));
}

#[test]
fn what_has_begun_to_arrive_makes_room_for_what_is_made_here() {
    let dir = tempfile::tempdir().unwrap();
    let blobs = within(dir.path());
    let whole = content(2 * CHUNK_BYTES);
    let entry = BlobEntry::of(&whole);
    let mut partial = blobs.receive(&entry).unwrap();
    partial.write(1, &whole[CHUNK_BYTES..]).unwrap();
    drop(partial);
    let made = |bytes: &[u8]| {
        let mut draft = blobs.draft().unwrap();
        draft.write_all(bytes).unwrap();
        blobs.keep_as(draft, &entry)
    };
    assert!(matches!(made(&whole[1..]), Err(BlobError::MadeOther { .. })));
    assert!(!blobs.has(&entry.id));
    made(&whole).unwrap();
    assert_eq!(blobs.read_verified(&entry).unwrap(), whole);
    assert_eq!(blobs.usage().used_bytes, entry.bytes);
    assert_eq!(fs::read_dir(dir.path().join("partial")).unwrap().count(), 0);
}

#[test]
fn a_full_disk_refuses_more_and_keeps_what_is_there() {
    let (dir, mut blobs) = fresh();
    let held = blobs.put(&[1; 100]).unwrap();
    let room = Room::of(dir.path(), WEIGHTS_RESERVE_BYTES).with(|_| Ok(WEIGHTS_RESERVE_BYTES + 9));
    std::sync::Arc::get_mut(&mut blobs.0).unwrap().room = room;
    assert!(blobs.full_disk().is_none(), "nine bytes fit");
    let refused = blobs.receive(&BlobEntry::of(&[2; 10])).unwrap_err();
    assert!(
        matches!(&refused, BlobError::Full(full) if full.path == dir.path()) && refused.is_full_disk(),
        "{refused}"
    );
    let mut draft = blobs.draft().unwrap();
    let error = draft.write_all(&[3; 1 << 20]).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::StorageFull);
    drop(draft);
    assert_eq!(blobs.read_verified(&held).unwrap(), [1; 100]);
    assert_eq!(blobs.usage().used_bytes, 100);
    assert!(blobs.put(&[4; 9]).is_ok() && blobs.remove(&held.id).unwrap());
}

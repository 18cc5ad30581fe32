use coel_model::weights::checkpoint::Checkpoint;
use coel_store::manifest::FORMAT;
use coel_store::{BlobEntry, PartEntry};

use super::*;

fn fixture() -> std::path::PathBuf {
    std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/fixture")
}

/// A model of four experts beside a trunk of 1000 bytes, with the configuration of the bundled one.
fn sizes() -> ModelSizes {
    let config = std::fs::read_to_string(fixture().join("config.json")).unwrap();
    let blob = |bytes| BlobEntry { bytes, ..BlobEntry::default() };
    let slices =
        |exact, base, refine| Slices { exact: blob(exact), base: Some(blob(base)), refine: Some(blob(refine)) };
    let manifest = Manifest {
        format: FORMAT,
        architecture: "Test".into(),
        files: Vec::new(),
        trunk: vec![PartEntry { name: "head".into(), slices: slices(1000, 300, 200) }],
        experts: (0..4).map(|index| (ExpertId::new(0, index), slices(160, 50, 40))).collect(),
    };
    ModelSizes::of_manifest(&manifest, 10, &ModelConfig::parse(&config).unwrap())
}

fn offer(disk_bytes: Option<u64>, trunk: Precision) -> Offer {
    Offer { disk_bytes, trunk: Some(trunk), ..Offer::default() }
}

fn limits() -> Limits {
    Limits {
        memory_bytes: u64::MAX,
        vram_bytes: None,
        offload_bytes: None,
        disk_bytes: None,
        kv_tokens: 16,
        experts: Bounds::AUTO,
        trunk: Bounds::AUTO,
    }
}

#[test]
fn a_disk_holds_what_everybody_keeps_and_room_for_an_exchange_before_experts() {
    let sizes = sizes();
    assert_eq!(sizes.offered_disk(&offer(None, Precision::Q4), false), None, "no bound, and no paging");
    assert_eq!(sizes.offered_disk(&offer(Some(1000), Precision::Q4), false), Some(1000 - 10 - 300 - 160));
    assert_eq!(sizes.offered_disk(&offer(Some(1000), Precision::Exact), false), Some(0));
    assert_eq!(sizes.offered_disk(&offer(Some(1000), Precision::Exact), true), Some(4 * 160), "it has them already");
}

#[test]
fn a_small_disk_takes_the_trunk_at_fewer_bits() {
    let sizes = sizes();
    let chosen = |disk: Option<u64>| sizes.trunk_precision(&limits(), disk, 1);
    // Beside the manifest, the experts at Q4 and an exchange.
    let beside = 10 + 4 * 50 + 160;
    let least = [(None, Precision::Exact), (Some(1000), Precision::Exact), (Some(999), Precision::Q8)];
    for (trunk, precision) in least.into_iter().chain([(Some(500), Precision::Q8), (Some(499), Precision::Q4)]) {
        assert_eq!(chosen(trunk.map(|trunk: u64| trunk + beside)), precision, "{trunk:?}");
    }
}

#[test]
fn what_the_mesh_wants_and_a_node_does_not_accept_has_no_room() {
    let sizes = sizes();
    let fixed = sizes.fixed_bytes(0, Precision::Q4);
    let exact =
        Offer { memory_bytes: fixed + 500, accepts: Bounds::only(Precision::Exact), ..offer(None, Precision::Q4) };
    assert_eq!(sizes.offered_room(&exact, false, Bounds::AUTO), (500, 0));
    assert_eq!(sizes.offered_room(&exact, false, Bounds::only(Precision::Q4)), (0, 0));
    // What is in memory is on the disk too; and a disk without enough memory is not paged to.
    let small = Offer { disk_bytes: Some(310 + 160 + 90), accepts: Bounds::AUTO, ..exact };
    assert_eq!(sizes.offered_room(&small, false, Bounds::AUTO), (90, 0));
    let paging = Offer { memory_bytes: fixed + sizes.paging_bytes_min(Precision::Q4), ..small };
    assert_eq!(sizes.offered_room(&paging, false, Bounds::AUTO), (90, 90));
}

#[test]
fn offload_memory_holds_the_table_and_experts_on_their_way_before_others() {
    let sizes = sizes();
    let fixed = sizes.offload_fixed_bytes(Precision::Q4);
    assert_eq!(fixed, 6 * 160, "this model's trunk has no embedding table");
    let with = |offload_bytes| Limits { memory_bytes: 1 << 30, offload_bytes, ..limits() };
    assert_eq!(sizes.memory_bytes(&with(None), Precision::Q4), 1 << 30);
    assert_eq!(sizes.memory_bytes(&with(Some(fixed + 70)), Precision::Q4), (1 << 30) - fixed);
    let room = |more| sizes.paging_room(&with(Some(fixed + 70)), Precision::Q4, &Ledger::default(), more);
    assert_eq!((room(0), room(30), room(100)), (70, 40, 0));
}

#[test]
fn a_folder_and_the_model_registered_from_it_have_the_same_sizes() {
    let folder = ModelFolder::open(&fixture()).unwrap();
    let sizes = ModelSizes::of_folder(&folder);
    let all = parts(&Checkpoint::open(&fixture()).unwrap());
    let exact = |expert: bool| -> u64 {
        let some = all.iter().filter(|part| part.expert().is_some() == expert);
        some.map(|part| part.header().len() as u64 + part.data_bytes()).sum()
    };
    assert_eq!(sizes.trunk_bytes(Precision::Exact), exact(false));
    assert_eq!(sizes.experts_bytes(Precision::Exact), exact(true));
    assert!(sizes.experts_bytes(Precision::Q4) < sizes.experts_bytes(Precision::Q8));
    // Beside the fixed part, room for one more byte than ten experts holds ten.
    let fixed = sizes.fixed_bytes(64, Precision::Q8);
    let fits = sizes.fits(fixed + 10 * sizes.largest_expert_bytes(Precision::Exact) + 1, 64);
    let q8 = fits.iter().find(|fit| fit.trunk == Precision::Q8).unwrap();
    assert_eq!((q8.fixed_bytes, q8.experts[2]), (fixed, Some(10)));
    assert_eq!(sizes.fits(fixed - 1, 64)[1].experts, [None; 3], "not even the trunk");
}

#[test]
fn what_is_too_small_is_named_with_both_numbers_and_the_remedy() {
    let sizes = sizes();
    let fixed = sizes.fixed_bytes(16, Precision::Q4);
    let memory = |memory_bytes| sizes.check_memory("tiny", &Limits { memory_bytes, ..limits() });
    assert_eq!(memory(fixed), Ok(()));
    let said = memory(fixed - 1).unwrap_err().to_string();
    for part in [&format!("({} bytes)", fixed - 1), &format!("({fixed} bytes)"), "'tiny'", "--memory", "--kv-tokens"] {
        assert!(said.contains(part), "{part}: {said}");
    }
    assert_eq!(sizes.check_disk("tiny", 310, Precision::Q4), Ok(()));
    let said = sizes.check_disk("tiny", 309, Precision::Q4).unwrap_err().to_string();
    assert!(said.contains("(309 bytes)") && said.contains("(310 bytes)") && said.contains("--trunk"), "{said}");
    let needed = sizes.offload_fixed_bytes(Precision::Q4) + sizes.paging_bytes_min(Precision::Q4);
    let offload = |bytes, disk_bytes| {
        let limits = Limits { offload_bytes: Some(bytes), disk_bytes, ..limits() };
        sizes.check_offload(&limits, Precision::Q4)
    };
    assert_eq!((offload(needed, Some(1)), offload(0, None)), (Ok(()), Ok(())));
    let said = offload(needed - 1, Some(1)).unwrap_err().to_string();
    assert!(said.contains(&format!("({needed} bytes)")) && said.contains("leave --disk out"), "{said}");
}

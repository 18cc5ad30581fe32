//! [`Cache`]: rules of eviction one by one, then properties of any history.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::{super::score::HALF_LIFE, *};

type Id = u8;

/// A cache of `capacity` bytes with such entries, the first of which are resident as far as they fit.
fn cache(capacity: u64, sizes: &[u64]) -> Cache<Id> {
    let mut cache = Cache::new(capacity);
    for (id, bytes) in (0..).zip(sizes) {
        cache.insert(id, *bytes);
        cache.admit_if_free(id);
    }
    cache
}

fn residents(cache: &Cache<Id>) -> BTreeSet<Id> {
    cache.entries.iter().filter(|(_, entry)| entry.resident).map(|(id, _)| *id).collect()
}

#[test]
fn the_coldest_goes_first_and_among_equals_the_one_used_last() {
    let mut cache = cache(30, &[10; 6]);
    for id in [0, 1, 2, 0] {
        cache.touch(id, 1.0);
    }
    assert_eq!(cache.admit(3, Admission::Required), Some(vec![2]), "as cold as 1, and used after it");
    assert_eq!(cache.admit(4, Admission::Required), Some(vec![3]), "never used");
    cache.evict(4);
    assert_eq!(cache.admit(3, Admission::Required), Some(vec![]));
    // One use now outweighs two uses long ago.
    (0..2 * HALF_LIFE as usize).for_each(|_| cache.tick());
    cache.touch(1, 1.0);
    cache.touch(3, 1.0);
    assert_eq!(cache.admit(5, Admission::Required), Some(vec![0]));
}

#[test]
fn pins_and_predictions_protect() {
    let mut cache = cache(30, &[10; 5]);
    for id in [1, 2, 2, 3, 3] {
        cache.touch(id, 1.0);
    }
    cache.pin(0);
    cache.predict(1);
    let worth = |cache: &Cache<Id>| Admission::IfWorth(cache.score_if_used(3, 1.0).unwrap());
    assert_eq!(cache.admit(3, worth(&cache)), Some(vec![2]), "0 and 1 are colder, but protected");
    assert_eq!(cache.admit(2, worth(&cache)), Some(vec![3]), "worth more than two uses");
    cache.touch(2, 1.0);
    assert_eq!(cache.admit(3, worth(&cache)), None, "as cold as the newcomer is not colder");
    assert_eq!(cache.admit(3, Admission::Required), Some(vec![2]), "the predicted entry goes last");
    assert_eq!(cache.admit(4, Admission::Required), Some(vec![3]));
    cache.pin(4);
    assert_eq!(cache.admit(2, Admission::Required), Some(vec![1]));
    cache.pin(2);
    assert_eq!(cache.admit(1, Admission::Required), None, "all are pinned");
    cache.unpin(0);
    assert_eq!(cache.admit(1, Admission::Required), Some(vec![0]));
}

#[test]
fn an_admission_evicts_enough_or_nothing() {
    let mut cache = cache(30, &[10, 10, 10, 25, 31]);
    cache.pin(1);
    assert_eq!(cache.admit(3, Admission::Required), None, "two of three are too little");
    assert_eq!(residents(&cache), [0, 1, 2].into());
    cache.unpin(1);
    assert_eq!(cache.admit(4, Admission::Required), None, "larger than the capacity");
    assert_eq!(cache.admit(9, Admission::Required), None, "unknown");
    assert_eq!(cache.admit(0, Admission::Required), None, "resident already");
    assert_eq!(cache.admit(3, Admission::Required), Some(vec![0, 1, 2]));
    assert_eq!((residents(&cache), cache.used(), cache.resident_count()), ([3].into(), 25, 1));
}

#[test]
fn a_reservation_takes_its_bytes_until_the_load_ends() {
    let mut cache = cache(20, &[10, 10, 15, 5]);
    let (reservation, evicted) = cache.reserve(2, Admission::Required).unwrap();
    assert_eq!((evicted, cache.used(), cache.is_resident(2)), (vec![0, 1], 15, false));
    assert!(cache.admit_if_free(3) && !cache.admit_if_free(0));
    cache.remove(2);
    assert_eq!(cache.used(), 20, "the load is still under way");
    cache.cancel(reservation);
    assert_eq!(cache.used(), 5);
    let (reservation, _) = cache.reserve(0, Admission::Required).unwrap();
    cache.fulfil(0, reservation);
    assert!(cache.is_resident(0) && cache.used() == 15);
}

#[test]
fn a_replaced_entry_keeps_its_score_and_its_pins() {
    let mut cache = cache(20, &[10, 10, 10]);
    cache.touch(0, 1.0);
    cache.pin(0);
    cache.predict(0);
    let score = cache.score_if_used(0, 1.0);
    cache.insert(0, 20);
    assert_eq!((cache.is_resident(0), cache.used(), cache.bytes(0)), (false, 10, Some(20)));
    assert!(cache.is_pinned(0) && cache.is_predicted(0) && cache.score_if_used(0, 1.0) == score);
    cache.remove(0);
    cache.insert(0, 10);
    assert!(!cache.is_pinned(0) && !cache.is_predicted(0) && cache.score_if_used(0, 1.0) != score);
}

#[test]
fn a_smaller_capacity_spares_pinned_entries_only() {
    let mut cache = cache(40, &[10; 4]);
    cache.touch(2, 1.0);
    cache.pin(0);
    cache.predict(1);
    cache.set_capacity(25);
    assert_eq!(cache.shrink(), [1, 3]);
    cache.set_capacity(5);
    assert_eq!((cache.shrink(), cache.used()), (vec![2], 10));
    cache.unpin(0);
    assert_eq!((cache.shrink(), cache.used()), (vec![0], 0));
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Insert(Id, u64),
    Remove(Id),
    Evict(Id),
    Tick,
    Touch(Id, u8),
    Pin(Id),
    Unpin(Id),
    Predict(Id),
    Unpredict(Id),
    Admit(Id, bool),
    AdmitIfFree(Id),
    Reserve(Id, bool),
    EndLoad(usize, bool),
    Capacity(u64),
}

const IDS: Id = 12;

fn step() -> impl Strategy<Value = Step> {
    let id = || 0..IDS;
    prop_oneof![
        1 => (id(), 1u64..20).prop_map(|(id, bytes)| Step::Insert(id, bytes)),
        1 => id().prop_map(Step::Remove),
        1 => id().prop_map(Step::Evict),
        1 => Just(Step::Tick),
        5 => (id(), 1u8..5).prop_map(|(id, share)| Step::Touch(id, share)),
        3 => id().prop_map(Step::Pin),
        3 => id().prop_map(Step::Unpin),
        2 => id().prop_map(Step::Predict),
        2 => id().prop_map(Step::Unpredict),
        8 => (id(), any::<bool>()).prop_map(|(id, required)| Step::Admit(id, required)),
        3 => id().prop_map(Step::AdmitIfFree),
        4 => (id(), any::<bool>()).prop_map(|(id, required)| Step::Reserve(id, required)),
        4 => (any::<usize>(), any::<bool>()).prop_map(|(load, arrived)| Step::EndLoad(load, arrived)),
        1 => (0u64..60).prop_map(Step::Capacity),
    ]
}

fn admission(cache: &Cache<Id>, id: Id, required: bool) -> Admission {
    match cache.score_if_used(id, 1.0) {
        Some(worth) if !required => Admission::IfWorth(worth),
        _ => Admission::Required,
    }
}

/// Checks what an admission of `id` may and must have evicted, given the residents before.
fn check_admission(
    cache: &Cache<Id>,
    id: Id,
    admission: Admission,
    (before, used): (&BTreeSet<Id>, u64),
    evicted: Option<&[Id]>,
) -> Result<(), TestCaseError> {
    let Some(entry) = cache.entries.get(&id).filter(|_| !before.contains(&id)) else {
        prop_assert!(evicted.is_none(), "{id} is unknown or resident");
        return Ok(());
    };
    let may_go = |id: &Id| {
        let entry = &cache.entries[id];
        let spared = match admission {
            Admission::Required => false,
            Admission::IfWorth(worth) => entry.predictions > 0 || entry.score.is_at_least(&worth),
        };
        entry.pins == 0 && !spared
    };
    let sum = |ids: &mut dyn Iterator<Item = &Id>| ids.map(|id| cache.entries[id].bytes).sum::<u64>();
    let excess = (used + entry.bytes).saturating_sub(cache.capacity);
    let Some(evicted) = evicted else {
        prop_assert!(sum(&mut before.iter().filter(|id| may_go(id))) < excess, "{id} would have fitted");
        let mut now = residents(cache);
        now.remove(&id);
        prop_assert!(now == *before && cache.used() == used, "a refused admission changes nothing");
        return Ok(());
    };
    prop_assert!(evicted.iter().all(|id| before.contains(id) && may_go(id)), "{evicted:?} of {before:?}");
    prop_assert!(sum(&mut evicted.iter()) >= excess);
    if let Some((_, rest)) = evicted.split_last() {
        prop_assert!(sum(&mut rest.iter()) < excess, "{evicted:?} is more than needed");
    }
    let colder = |a: &Id, b: &Id| {
        let (a, b) = (&cache.entries[a], &cache.entries[b]);
        (a.predictions > 0).cmp(&(b.predictions > 0)).then(a.score.total_cmp(&b.score)).is_le()
    };
    for stays in before.iter().filter(|id| !evicted.contains(id) && may_go(id)) {
        prop_assert!(evicted.iter().all(|goes| colder(goes, stays)), "{stays} is colder than some of {evicted:?}");
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// The capacity is never exceeded by what is brought in, no pinned entry is evicted to make room, admissions are
    /// all or nothing, and the accounts agree with the entries.
    #[test]
    fn any_history(
        capacity in 0u64..60,
        sizes in prop::collection::vec(1u64..20, usize::from(IDS)),
        steps in prop::collection::vec(step(), 0..120),
    ) {
        let mut cache = cache(capacity, &sizes);
        // Loads under way, and whether their entry still waits for them.
        let mut loads: Vec<(Id, Reservation, bool)> = Vec::new();
        for step in steps {
            let (before, used) = (residents(&cache), cache.used());
            match step {
                Step::Insert(id, bytes) => {
                    cache.insert(id, bytes);
                    loads.iter_mut().filter(|load| load.0 == id).for_each(|load| load.2 = false);
                    prop_assert!(!cache.is_resident(id));
                }
                Step::Remove(id) => {
                    cache.remove(id);
                    loads.iter_mut().filter(|load| load.0 == id).for_each(|load| load.2 = false);
                    prop_assert!(!cache.contains(id));
                }
                Step::Evict(id) => prop_assert_eq!(cache.evict(id), before.contains(&id)),
                Step::Tick => cache.tick(),
                Step::Touch(id, share) => _ = cache.touch(id, f64::from(share) / 4.0),
                Step::Pin(id) => cache.pin(id),
                Step::Unpin(id) => if cache.is_pinned(id) { cache.unpin(id) },
                Step::Predict(id) => cache.predict(id),
                Step::Unpredict(id) => if cache.is_predicted(id) { cache.unpredict(id) },
                Step::Admit(id, required) => {
                    let admission = admission(&cache, id, required);
                    let evicted = cache.admit(id, admission);
                    check_admission(&cache, id, admission, (&before, used), evicted.as_deref())?;
                    prop_assert_eq!(cache.is_resident(id), evicted.is_some() || before.contains(&id));
                }
                Step::AdmitIfFree(id) => {
                    let admitted = cache.admit_if_free(id);
                    prop_assert!(before.is_subset(&residents(&cache)));
                    prop_assert_eq!(cache.is_resident(id), admitted || before.contains(&id));
                }
                Step::Reserve(id, required) => {
                    let admission = admission(&cache, id, required);
                    let reserved = cache.reserve(id, admission);
                    let evicted = reserved.as_ref().map(|(_, evicted)| evicted.as_slice());
                    check_admission(&cache, id, admission, (&before, used), evicted)?;
                    loads.extend(reserved.map(|(reservation, _)| (id, reservation, true)));
                }
                Step::EndLoad(load, arrived) if !loads.is_empty() => {
                    let (id, reservation, current) = loads.swap_remove(load % loads.len());
                    match arrived && current && !cache.is_resident(id) {
                        true => cache.fulfil(id, reservation),
                        false => cache.cancel(reservation),
                    }
                }
                Step::EndLoad(..) => {}
                Step::Capacity(capacity) => {
                    cache.set_capacity(capacity);
                    let evicted = cache.shrink();
                    prop_assert!(evicted.iter().all(|id| before.contains(id) && !cache.is_pinned(*id)));
                    let all_pinned = residents(&cache).into_iter().all(|id| cache.is_pinned(id));
                    prop_assert!(cache.used() <= capacity || all_pinned);
                }
            }
            prop_assert!(cache.used() <= cache.capacity().max(used), "{step:?} exceeds the capacity");
            let resident_bytes: u64 = residents(&cache).iter().map(|id| cache.entries[id].bytes).sum();
            let reserved: u64 = loads.iter().map(|(_, reservation, _)| reservation.bytes).sum();
            prop_assert_eq!(cache.used(), resident_bytes + reserved);
            prop_assert_eq!(cache.resident_count(), residents(&cache).len());
        }
    }
}

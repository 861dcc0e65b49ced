//! What holds of every placement, and of every history of placements.

use proptest::prelude::*;

use super::tests::{node, request};
use super::*;

#[derive(Debug, Clone)]
struct Wish {
    priority: i32,
    min: u32,
    extra: u32,
    spares: u32,
    refused: BTreeSet<usize>,
}

fn wishes(most: usize) -> impl Strategy<Value = Vec<Wish>> {
    let refused = proptest::collection::btree_set(0usize..6, 0..2);
    let wish = (-1i32..2, 1u32..6, 0u32..4, 0u32..3, refused);
    let wish = wish.prop_map(|(priority, min, extra, spares, refused)| Wish { priority, min, extra, spares, refused });
    proptest::collection::vec(wish, 1..most)
}

fn clusters() -> impl Strategy<Value = Vec<(u32, u8)>> {
    proptest::collection::vec((1u32..5, 0u8..3), 1..6)
}

fn sites(nodes: &[(u32, u8)]) -> BTreeMap<NodeName, Site> {
    let site = |(at, (slots, rack)): (usize, &(u32, u8))| {
        (node(&format!("n{at}")), Site { slots: *slots, rack: format!("r{rack}") })
    };
    nodes.iter().enumerate().map(site).collect()
}

fn requests(wishes: &[Wish]) -> Vec<Request> {
    let asked = |(at, wish): (usize, &Wish)| Request {
        priority: wish.priority,
        spares: wish.spares,
        refused: wish.refused.iter().map(|at| node(&format!("n{at}"))).collect(),
        ..request(&format!("j{at}"), wish.min, wish.min + wish.extra)
    };
    wishes.iter().enumerate().map(asked).collect()
}

/// What is promised of every single placement.
fn check(sites: &BTreeMap<NodeName, Site>, requests: &[Request]) -> BTreeMap<JobName, Share> {
    let shares = schedule(sites, requests);
    assert_eq!(shares, schedule(sites, requests), "the same question has the same answer");
    for (name, site) in sites {
        let told = |request: &Request| {
            let share = &shares[&request.job];
            let on = |placement: &Placement| placement.get(name).copied().unwrap_or(0);
            (on(&share.workers) + on(&share.spares)).max(on(&request.bound))
        };
        assert!(requests.iter().map(told).sum::<u32>() <= site.slots, "{name} has {} slots: {shares:?}", site.slots);
    }
    for request in requests {
        let share = &shares[&request.job];
        let workers = total(&share.workers);
        assert!(workers <= request.max && total(&share.spares) <= request.spares);
        let acts = !request.bound.is_empty();
        assert!(workers == 0 || workers >= request.min || acts || total(&request.holds) > 0, "half a gang: {share:?}");
        for name in share.workers.keys().chain(share.spares.keys()) {
            assert!(sites.contains_key(name) && !request.refused.contains(name), "{} on {name}", request.job);
        }
    }
    shares
}

/// Whether a job that is placed at all is so with its minimum, once everything has come to rest.
fn gangs(requests: &[Request], shares: &BTreeMap<JobName, Share>) -> bool {
    requests.iter().all(|request| {
        let workers = total(&shares[&request.job].workers);
        workers == 0 || workers >= request.min
    })
}

/// Generations stop when they are to, new ones form: until nothing changes any more.
fn settle(sites: &BTreeMap<NodeName, Site>, requests: &mut [Request]) -> BTreeMap<JobName, Share> {
    for _ in 0..50 {
        let shares = check(sites, requests);
        let before = requests.to_vec();
        for request in requests.iter_mut() {
            let share = &shares[&request.job];
            request.reserve.clone_from(&share.spares);
            request.holds.clone_from(&share.workers);
            request.bound = if total(&share.workers) >= request.min { share.workers.clone() } else { Placement::new() };
        }
        if before == requests {
            assert!(gangs(requests, &shares), "{shares:?}");
            return shares;
        }
    }
    panic!("placements never come to rest: {requests:?}");
}

/// Whether a job has at least what it had, where it had it.
fn stays(before: &Share, after: &Share) -> bool {
    before.workers.iter().all(|(name, workers)| after.workers.get(name) >= Some(workers))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_placement_is_a_good_one_and_comes_to_rest(nodes in clusters(), wishes in wishes(6)) {
        let sites = sites(&nodes);
        let mut asked = requests(&wishes);
        let shares = settle(&sites, &mut asked);
        // The first of the highest priority that fits the empty cluster runs.
        let top = wishes.iter().map(|wish| wish.priority).max().unwrap();
        let room = |request: &Request| -> u32 {
            sites.iter().filter(|(name, _)| !request.refused.contains(*name)).map(|(_, site)| site.slots).sum()
        };
        let first = asked.iter().filter(|request| request.priority == top).find(|request| room(request) >= request.min);
        if let Some(first) = first {
            prop_assert!(total(&shares[&first.job].workers) >= first.min, "{} waits: {shares:?}", first.job);
        }
    }

    /// Who comes, goes or changes moves nobody of a higher priority, and of the same one only takes nothing away.
    #[test]
    fn what_a_job_holds_does_not_move(
        nodes in clusters(),
        wishes in wishes(5),
        newcomer in wishes(2),
        change in (0usize..6, 0u32..5),
    ) {
        let mut sites = sites(&nodes);
        let mut asked = requests(&wishes);
        let before = settle(&sites, &mut asked);
        let running: Vec<Request> = asked.iter().filter(|request| !request.bound.is_empty()).cloned().collect();
        let mut more = requests(&newcomer);
        more[0].job = JobName::new("new").unwrap();
        asked.extend(more);
        let after = check(&sites, &asked);
        for request in running.iter().filter(|request| request.priority >= asked[asked.len() - 1].priority) {
            prop_assert!(stays(&before[&request.job], &after[&request.job]), "{} moved: {after:?}", request.job);
        }
        // Another node's coming, growing or going takes nothing from those that are not on it.
        asked.pop();
        let changed = node(&format!("n{}", change.0));
        match change.1 {
            0 => drop(sites.remove(&changed)),
            slots => {
                let had = sites.get(&changed).map_or(0, |site| site.slots);
                sites.insert(changed.clone(), Site { slots: had.max(slots), rack: "r9".into() });
            }
        }
        let after = schedule(&sites, &asked);
        let hit = |request: &Request| request.holds.contains_key(&changed) || request.reserve.contains_key(&changed);
        let wants = |request: &Request| {
            total(&request.holds) < request.max || total(&request.reserve) < request.spares || hit(request)
        };
        for request in running.iter().filter(|request| !hit(request)) {
            // Only a job above it that lacks something may take from it.
            if asked.iter().any(|other| other.priority > request.priority && wants(other)) {
                continue;
            }
            prop_assert!(stays(&before[&request.job], &after[&request.job]), "{} moved: {after:?}", request.job);
        }
    }

    /// Jobs run and finish in any order, and smaller ones of the same priority keep coming: in the end everyone that
    /// fits the empty cluster has run.
    #[test]
    fn nobody_starves(nodes in clusters(), wishes in wishes(6), order in proptest::collection::vec(any::<u8>(), 40)) {
        let sites = sites(&nodes);
        let equal: Vec<Wish> = wishes.into_iter().map(|wish| Wish { priority: 0, ..wish }).collect();
        let mut waiting = requests(&equal);
        let fits = |request: &Request| {
            let open = sites.iter().filter(|(name, _)| !request.refused.contains(*name));
            open.map(|(_, site)| site.slots).sum::<u32>() >= request.min
        };
        waiting.retain(fits);
        let mut unserved: BTreeSet<JobName> = waiting.iter().map(|request| request.job.clone()).collect();
        for (round, pick) in order.into_iter().enumerate() {
            waiting.push(request(&format!("small{round}"), 1, 1));
            for request in &mut waiting {
                request.overdue = request.holds.is_empty() && unserved.contains(&request.job);
            }
            let shares = settle(&sites, &mut waiting);
            let running: Vec<JobName> =
                shares.iter().filter(|(_, share)| !share.workers.is_empty()).map(|(job, _)| job.clone()).collect();
            unserved.retain(|job| !running.contains(job));
            if let Some(done) = running.get(usize::from(pick) % running.len().max(1)) {
                waiting.retain(|request| request.job != *done);
            }
        }
        // Small jobs run one round each once nobody is behind: forty rounds are more than there are slots and jobs.
        prop_assert!(unserved.is_empty(), "never ran: {unserved:?}");
    }

    /// A higher job is never without its minimum while lower ones have what would be enough for it.
    #[test]
    fn priority_is_respected(nodes in clusters(), wishes in wishes(6)) {
        let sites = sites(&nodes);
        let mut asked = requests(&wishes);
        settle(&sites, &mut asked);
        for request in asked.iter().filter(|request| request.bound.is_empty()) {
            let usable = |name: &NodeName| !request.refused.contains(name);
            let above = |other: &&Request| other.priority >= request.priority && other.job != request.job;
            let held = |name: &NodeName| -> u32 {
                let on = |placement: &Placement| placement.get(name).copied().unwrap_or(0);
                asked.iter().filter(above).map(|other| on(&other.holds) + on(&other.reserve)).sum()
            };
            let could: u32 =
                sites.iter().filter(|(name, _)| usable(name)).map(|(name, site)| site.slots - held(name)).sum();
            prop_assert!(could < request.min, "{} waits, though {could} slots are below it", request.job);
        }
    }
}

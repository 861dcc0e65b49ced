//! Placement by example, one rule a test.

use super::*;

pub(super) fn node(name: &str) -> NodeName {
    NodeName::new(name).unwrap()
}

fn placement(nodes: &[(&str, u32)]) -> Placement {
    nodes.iter().map(|(name, workers)| (node(name), *workers)).collect()
}

pub(super) fn request(job: &str, min: u32, max: u32) -> Request {
    Request {
        job: JobName::new(job).unwrap(),
        priority: 0,
        min,
        max,
        spares: 0,
        refused: BTreeSet::new(),
        holds: Placement::new(),
        reserve: Placement::new(),
        bound: Placement::new(),
        firm: false,
        overdue: false,
    }
}

/// A job that holds these workers without a generation.
fn holder(job: &str, min: u32, max: u32, holds: &[(&str, u32)]) -> Request {
    Request { holds: placement(holds), ..request(job, min, max) }
}

/// A job whose workers act.
fn actor(job: &str, min: u32, max: u32, holds: &[(&str, u32)]) -> Request {
    Request { bound: placement(holds), ..holder(job, min, max, holds) }
}

fn sites(nodes: &[(&str, u32, &str)]) -> BTreeMap<NodeName, Site> {
    nodes.iter().map(|(name, slots, rack)| (node(name), Site { slots: *slots, rack: (*rack).into() })).collect()
}

fn flat(nodes: &[(&str, u32)]) -> BTreeMap<NodeName, Site> {
    nodes.iter().map(|(name, slots)| (node(name), Site { slots: *slots, rack: String::new() })).collect()
}

fn words(placement: &Placement) -> String {
    placement.iter().map(|(node, workers)| format!("{node}{workers}")).collect::<Vec<_>>().join(" ")
}

/// The workers of each job, in the order of the requests.
fn placed(sites: &BTreeMap<NodeName, Site>, requests: &[Request]) -> Vec<String> {
    let shares = schedule(sites, requests);
    requests.iter().map(|request| words(&shares[&request.job].workers)).collect()
}

#[test]
fn workers_spread_evenly_over_nodes() {
    assert_eq!(placed(&flat(&[("a", 4), ("b", 4)]), &[request("x", 1, 5)]), ["a3 b2"]);
    assert_eq!(placed(&flat(&[("a", 1), ("b", 4)]), &[request("x", 1, 3)]), ["a1 b2"]);
}

#[test]
fn a_gang_is_all_or_nothing_and_later_jobs_use_the_rest() {
    assert_eq!(placed(&flat(&[("a", 3)]), &[request("x", 4, 8), request("y", 1, 2)]), ["", "a2"]);
}

#[test]
fn holders_keep_their_slots_and_grow_only_after_waiting_jobs() {
    let requests = [request("x", 2, 2), holder("y", 1, 4, &[("a", 2)])];
    assert_eq!(placed(&flat(&[("a", 4)]), &requests), ["a2", "a2"]);
    assert_eq!(placed(&flat(&[("a", 3)]), &requests), ["", "a3"]);
}

#[test]
fn a_lost_node_shrinks_the_job_and_a_refused_one_is_not_used() {
    assert_eq!(placed(&flat(&[("b", 2)]), &[holder("x", 1, 4, &[("a", 2), ("b", 2)])]), ["b2"]);
    let picky = Request { refused: BTreeSet::from([node("a")]), ..holder("x", 1, 4, &[("a", 2)]) };
    assert_eq!(placed(&flat(&[("a", 4), ("b", 1)]), &[picky]), ["b1"]);
}

#[test]
fn a_job_goes_into_as_few_racks_as_possible_and_the_smallest_that_will_do() {
    let racks = sites(&[("a", 2, "r1"), ("b", 2, "r2"), ("c", 2, "r1"), ("d", 2, "r2"), ("e", 4, "r3")]);
    assert_eq!(placed(&racks, &[request("x", 4, 4)]), ["a2 c2"]);
    assert_eq!(placed(&racks, &[request("x", 5, 5)]), ["a2 b1 c2"]);
    // What it has decides where it grows.
    assert_eq!(placed(&racks, &[holder("x", 1, 3, &[("d", 1)])]), ["b2 d1"]);
    let small = sites(&[("a", 8, "r1"), ("b", 2, "r2")]);
    assert_eq!(placed(&small, &[request("x", 2, 2)]), ["b2"]);
}

#[test]
fn a_minimum_takes_spares_and_surplus_and_then_whole_jobs_of_lower_priority() {
    let urgent = |min, max| Request { priority: 5, ..request("u", min, max) };
    let nodes = flat(&[("a", 4)]);
    // Only what is beyond the minimum: the lower job goes on, smaller.
    let requests = [holder("x", 2, 4, &[("a", 4)]), urgent(2, 2)];
    assert_eq!(placed(&nodes, &requests), ["a2", "a2"]);
    assert_eq!(schedule(&nodes, &requests)[&requests[0].job].yields_to, Some(requests[1].job.clone()));
    // All of it, and of the latest submission first.
    let requests = [holder("x", 2, 2, &[("a", 2)]), holder("y", 2, 2, &[("a", 2)]), urgent(2, 2)];
    assert_eq!(placed(&nodes, &requests), ["a2", "", "a2"]);
    // Nothing, if all together would not be enough.
    let requests = [holder("x", 2, 4, &[("a", 4)]), urgent(5, 5)];
    assert_eq!(placed(&nodes, &requests), ["a4", ""]);
    let requests = [Request { priority: 5, ..holder("x", 2, 4, &[("a", 4)]) }, urgent(2, 2)];
    assert_eq!(placed(&nodes, &requests), ["a4", ""], "of the same priority nothing is taken");
}

#[test]
fn growth_takes_surplus_of_lower_jobs_but_never_their_minimum() {
    let requests = [holder("x", 1, 4, &[("a", 4)]), Request { priority: 1, ..request("u", 1, 9) }];
    assert_eq!(placed(&flat(&[("a", 4)]), &requests), ["a1", "a3"]);
}

#[test]
fn what_acts_is_waited_for() {
    let nodes = flat(&[("a", 4)]);
    let urgent = Request { priority: 1, ..request("u", 4, 4) };
    let acting = [actor("x", 2, 4, &[("a", 4)]), urgent.clone()];
    // The lower job is told to give everything up, and the other waits until it has.
    assert_eq!(placed(&nodes, &acting), ["", ""]);
    assert_eq!(placed(&nodes, &[request("x", 2, 4), urgent]), ["", "a4"]);
}

#[test]
fn small_jobs_overtake_a_big_one_until_it_is_overdue() {
    let nodes = flat(&[("a", 4)]);
    let first = holder("x", 2, 2, &[("a", 2)]);
    let big = request("big", 4, 4);
    let small = request("s", 2, 2);
    assert_eq!(placed(&nodes, &[first.clone(), big.clone(), small.clone()]), ["a2", "", "a2"]);
    let overdue = Request { overdue: true, ..big };
    assert_eq!(placed(&nodes, &[first, overdue.clone(), small.clone()]), ["a2", "", ""]);
    assert_eq!(placed(&nodes, &[overdue, small.clone()]), ["a4", ""]);
    // What could never run holds nobody up.
    let hopeless = Request { overdue: true, ..request("h", 5, 5) };
    assert_eq!(placed(&nodes, &[hopeless, small]), ["", "a2"]);
}

#[test]
fn an_overdue_job_gets_back_what_its_peers_grew_by() {
    let elastic = holder("x", 1, 8, &[("a", 4)]);
    let waiting = request("y", 3, 3);
    assert_eq!(placed(&flat(&[("a", 4)]), &[elastic.clone(), waiting.clone()]), ["a4", ""]);
    let overdue = Request { overdue: true, ..waiting };
    assert_eq!(placed(&flat(&[("a", 4)]), &[elastic, overdue]), ["a1", "a3"]);
}

#[test]
fn spares_lie_apart_step_in_at_once_and_give_way_to_waiting_jobs() {
    let nodes = flat(&[("a", 2), ("b", 2), ("c", 2)]);
    let job = Request { spares: 2, ..request("x", 4, 4) };
    let share = &schedule(&nodes, std::slice::from_ref(&job))[&job.job];
    assert_eq!((words(&share.workers), words(&share.spares)), ("a2 b1 c1".into(), "b1 c1".into()));
    let apart = Request { spares: 2, holds: placement(&[("a", 2), ("b", 2)]), ..job };
    let share = &schedule(&nodes, std::slice::from_ref(&apart))[&apart.job];
    assert_eq!(words(&share.spares), "c2");
    // A node is lost: its workers' places are taken by the spares.
    let hit = Request { reserve: placement(&[("c", 2)]), bound: apart.holds.clone(), ..apart.clone() };
    let share = &schedule(&flat(&[("a", 2), ("c", 2)]), std::slice::from_ref(&hit))[&hit.job];
    assert_eq!((words(&share.workers), words(&share.spares)), ("a2 c2".into(), String::new()));
    let above = Request { priority: 1, ..request("u", 2, 2) };
    assert_eq!(placed(&nodes, &[hit, above]), ["a2 b2", "c2"]);
}

#[test]
fn a_job_not_all_heard_of_is_left_alone() {
    let firm = Request { firm: true, ..actor("x", 4, 4, &[("a", 2), ("b", 2)]) };
    let above = Request { priority: 1, ..request("u", 2, 2) };
    assert_eq!(placed(&flat(&[("a", 2)]), &[firm, above]), ["a2", ""]);
}

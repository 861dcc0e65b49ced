//! What is kept and what goes: each case as a person would tell it.

use super::*;

fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn membership(generation: u64, nodes: u32, start: Option<StepKey>) -> Membership {
    let members = (0..nodes).map(|rank| vec![rank]).collect();
    Membership { generation, members, me: 0, parities: 1, groups: 1, start }
}

fn peer(step: u64, encoded: bool) -> Vec<PeerStep> {
    vec![PeerStep { step, encoded }]
}

/// The other of two members says what it holds, after all that it has said before.
fn hear(keeper: &mut Keeper, steps: Vec<PeerStep>) {
    let sequence = keeper.peers.get(&1).map_or(1, |heard| heard.sequence + 1);
    assert!(keeper.peer(1, 1, sequence, steps));
}

/// A keeper of the first of two nodes whose other node has just said that it holds a step that this one captured.
fn both_hold(step: u64) -> Keeper {
    let mut keeper = Keeper::default();
    keeper.announce(membership(1, 2, None));
    keeper.captured((1, step), 0);
    hear(&mut keeper, peer(step, false));
    assert_eq!(keeper.advance(Duration::ZERO), [Keep::Publish, Keep::Encode((1, step))]);
    keeper
}

#[test]
fn a_node_alone_is_complete_with_its_own_ranks() {
    let mut keeper = Keeper::default();
    let both = Membership { members: vec![vec![0, 1]], ..membership(1, 1, None) };
    assert_eq!(keeper.announce(both.clone()), [Keep::Publish]);
    assert!(keeper.announce(both).is_empty(), "the same again is no news");
    assert!(keeper.captured((1, 5), 0));
    assert!(keeper.advance(Duration::ZERO).is_empty());
    keeper.captured((1, 5), 1);
    assert_eq!(keeper.advance(Duration::ZERO), [Keep::Publish, Keep::Complete((1, 5))]);
    assert!(keeper.advance(Duration::ZERO).is_empty());
    keeper.captured((1, 6), 0);
    keeper.captured((1, 6), 1);
    assert_eq!(keeper.advance(Duration::ZERO), [Keep::Publish, Keep::Complete((1, 6)), Keep::Release((1, 5))]);
    assert!(!keeper.captured((0, 9), 0), "of another generation");
}

#[test]
fn nothing_goes_before_a_newer_step_is_complete_on_every_member() {
    let mut keeper = Keeper::default();
    keeper.announce(membership(1, 2, None));
    for step in [5, 6] {
        keeper.captured((1, step), 0);
        assert_eq!(
            keeper.advance(Duration::ZERO),
            [Keep::Publish],
            "the peer does not hold it yet, and is told that this node does"
        );
        hear(&mut keeper, peer(step, false));
        assert_eq!(keeper.advance(Duration::ZERO), [Keep::Encode((1, step))]);
        assert!(keeper.advance(Duration::ZERO).is_empty());
        keeper.encoded((1, step), true);
        assert_eq!(keeper.advance(Duration::ZERO), [Keep::Publish], "the peer's parity is missing");
        hear(&mut keeper, peer(step, true));
        let mut expected = vec![Keep::Complete((1, step))];
        expected.extend((step == 6).then_some(Keep::Release((1, 5))));
        if step == 6 {
            expected.insert(0, Keep::Publish);
        }
        assert_eq!(keeper.advance(Duration::ZERO), expected);
    }
    assert_eq!(keeper.holds().collect::<Vec<_>>(), peer(6, true));
}

#[test]
fn with_several_groups_the_job_must_be_complete() {
    let mut keeper = Keeper::default();
    keeper.announce(Membership { groups: 2, ..membership(1, 1, None) });
    keeper.captured((1, 5), 0);
    keeper.advance(Duration::ZERO);
    keeper.captured((1, 6), 0);
    assert_eq!(keeper.advance(Duration::ZERO), [Keep::Publish, Keep::Complete((1, 6))]);
    assert_eq!(keeper.complete_everywhere((1, 5)), []);
    assert_eq!(keeper.complete_everywhere((1, 6)), [Keep::Release((1, 5))]);
}

#[test]
fn a_fenced_generation_is_kept_as_it_was_until_the_next_is_announced() {
    let mut keeper = Keeper::default();
    keeper.announce(membership(1, 2, None));
    keeper.captured((1, 5), 0);
    hear(&mut keeper, peer(5, true));
    keeper.advance(Duration::ZERO);
    keeper.encoded((1, 5), true);
    keeper.advance(Duration::ZERO);
    keeper.captured((1, 6), 0);
    hear(&mut keeper, peer(6, true));
    assert_eq!(keeper.advance(Duration::ZERO), [Keep::Publish, Keep::Encode((1, 6))]);
    keeper.fence(1);
    keeper.encoded((1, 6), true);
    assert!(keeper.advance(Duration::ZERO).is_empty(), "5 may have been chosen already");
    assert!(keeper.keeps((1, 5)) && keeper.keeps((1, 6)));
    assert_eq!(keeper.announce(membership(2, 1, Some((1, 5)))), [Keep::Release((1, 6)), Keep::Publish]);
    keeper.captured((2, 6), 0);
    assert_eq!(keeper.advance(Duration::ZERO), [Keep::Publish, Keep::Complete((2, 6)), Keep::Release((1, 5))]);
}

#[test]
fn a_failed_parity_is_tried_again() {
    let mut keeper = Keeper::default();
    keeper.announce(membership(1, 2, None));
    keeper.captured((1, 5), 0);
    hear(&mut keeper, peer(5, false));
    assert_eq!(keeper.advance(Duration::ZERO), [Keep::Publish, Keep::Encode((1, 5))]);
    keeper.encoded((1, 5), false);
    assert_eq!(keeper.advance(Duration::ZERO), [Keep::Encode((1, 5))]);
}

#[test]
fn a_step_whose_parity_cannot_be_made_is_given_up_when_its_slot_is_needed() {
    let mut keeper = both_hold(5);
    keeper.encoded((1, 5), false);
    assert_eq!(keeper.advance(secs(1)), [Keep::Encode((1, 5))]);
    keeper.encoded((1, 5), false);
    assert_eq!(keeper.advance(secs(100)), [Keep::Encode((1, 5))], "nobody needs the slot");
    keeper.short(Shortage::Memory);
    let gone = [Keep::Publish, Keep::GiveUp((1, 5)), Keep::Release((1, 5))];
    assert_eq!(keeper.advance(secs(100)), gone);
    assert!(keeper.advance(secs(101)).is_empty());
    keeper.encoded((1, 5), true);
    assert!(keeper.advance(secs(101)).is_empty() && !keeper.keeps((1, 5)), "what comes too late changes nothing");
    // The next one has less time, until one becomes complete.
    keeper.captured((1, 6), 0);
    assert_eq!(keeper.advance(secs(102)), [Keep::Publish]);
    assert_eq!(keeper.advance(secs(104)), [Keep::Publish, Keep::GiveUp((1, 6)), Keep::Release((1, 6))]);
}

#[test]
fn a_step_in_the_making_is_not_given_up() {
    let mut keeper = both_hold(5);
    keeper.short(Shortage::Store);
    assert!(keeper.advance(secs(1_000)).is_empty(), "its parity is being made, however long that takes");
    keeper.encoded((1, 5), false);
    assert_eq!(keeper.advance(secs(1_000)), [Keep::Encode((1, 5))]);
    assert!(keeper.advance(secs(1_001)).is_empty());
    assert_eq!(keeper.advance(secs(1_002)), [Keep::Publish, Keep::GiveUp((1, 5)), Keep::Release((1, 5))]);
}

#[test]
fn slow_hashing_gives_members_more_time() {
    let mut keeper = Keeper::default();
    keeper.announce(membership(1, 2, None));
    keeper.captured((1, 5), 0);
    keeper.hashed(secs(20));
    keeper.short(Shortage::Memory);
    assert_eq!(keeper.advance(secs(0)), [Keep::Publish]);
    assert!(keeper.advance(secs(89)).is_empty());
    assert_eq!(keeper.advance(secs(90)).len(), 3);
}

#[test]
fn a_step_with_parity_goes_only_with_a_member_that_has_it_no_more() {
    let mut keeper = both_hold(5);
    keeper.encoded((1, 5), true);
    assert_eq!(keeper.advance(secs(1)), [Keep::Publish]);
    assert!(keeper.advance(secs(100)).is_empty());
    keeper.short(Shortage::Memory);
    assert_eq!(keeper.advance(secs(100)), [Keep::Ask], "its word may be lost");
    assert!(keeper.advance(secs(101)).is_empty());
    assert_eq!(keeper.advance(secs(102)), [Keep::Ask]);
    keeper.answered(1, 1, 1, &peer(5, false), &[]);
    assert!(keeper.advance(secs(103)).is_empty());
    // A word that a newer one has overtaken.
    assert!(!keeper.peer(1, 1, 0, vec![]));
    assert!(keeper.keeps((1, 5)));
    keeper.answered(1, 1, 2, &[], &[]);
    assert_eq!(keeper.advance(secs(103)), [Keep::Publish, Keep::GiveUp((1, 5)), Keep::Release((1, 5))]);
}

#[test]
fn that_parity_is_made_is_also_learnt_late() {
    let mut keeper = both_hold(5);
    keeper.encoded((1, 5), true);
    keeper.short(Shortage::Memory);
    assert_eq!(keeper.advance(secs(0)), [Keep::Publish]);
    assert_eq!(keeper.advance(secs(2)), [Keep::Ask], "the link has broken as the other said that its parity is made");
    keeper.answered(1, 2, 2, &peer(5, true), &[5]);
    assert!(keeper.advance(secs(3)).is_empty(), "of another generation");
    keeper.answered(1, 1, 2, &peer(5, true), &[]);
    assert_eq!(keeper.advance(secs(3)), [Keep::Complete((1, 5))]);
}

#[test]
fn that_parity_is_made_is_also_learnt_by_way_of_a_third() {
    let mut keeper = Keeper::default();
    keeper.announce(membership(1, 3, None));
    keeper.captured((1, 5), 0);
    assert!(keeper.peer(1, 1, 1, peer(5, false)) && keeper.peer(2, 1, 1, peer(5, false)));
    assert_eq!(keeper.advance(secs(0)), [Keep::Publish, Keep::Encode((1, 5))]);
    keeper.encoded((1, 5), true);
    assert_eq!(keeper.advance(secs(1)), [Keep::Publish]);
    keeper.answered(2, 1, 2, &peer(5, true), &[]);
    assert!(keeper.advance(secs(1)).is_empty(), "the third has not heard of the other's parity either");
    keeper.answered(2, 1, 2, &peer(5, true), &[5]);
    assert_eq!(keeper.advance(secs(1)), [Keep::Complete((1, 5))]);
}

#[test]
fn what_is_complete_or_fenced_is_never_given_up() {
    let mut keeper = both_hold(5);
    keeper.encoded((1, 5), true);
    hear(&mut keeper, peer(5, true));
    assert_eq!(keeper.advance(secs(1)), [Keep::Publish, Keep::Complete((1, 5))]);
    keeper.short(Shortage::Store);
    hear(&mut keeper, vec![]);
    assert!(keeper.advance(secs(100)).is_empty());
    let mut fenced = both_hold(5);
    fenced.encoded((1, 5), false);
    fenced.short(Shortage::Store);
    fenced.fence(1);
    assert!(fenced.advance(secs(100)).is_empty() && fenced.keeps((1, 5)));
}

/// The first of two members in the first of two groups.
fn one_of_two_groups() -> Keeper {
    let mut keeper = Keeper::default();
    keeper.announce(Membership { groups: 2, ..membership(1, 2, None) });
    keeper
}

#[test]
fn with_several_groups_steps_become_complete_in_any_order_and_are_given_up() {
    let mut keeper = one_of_two_groups();
    keeper.captured((1, 5), 0);
    keeper.captured((1, 6), 0);
    hear(&mut keeper, [peer(5, false), peer(6, true)].concat());
    keeper.advance(secs(0));
    keeper.encoded((1, 5), false);
    keeper.encoded((1, 6), true);
    assert_eq!(keeper.advance(secs(1)), [Keep::Publish, Keep::Encode((1, 5)), Keep::Complete((1, 6))]);
    keeper.encoded((1, 5), false);
    keeper.short(Shortage::Store);
    assert_eq!(keeper.advance(secs(2)), [Keep::Encode((1, 5))], "6 may not become complete in the other group");
    keeper.encoded((1, 5), false);
    assert_eq!(keeper.advance(secs(3)), [Keep::Publish, Keep::GiveUp((1, 5)), Keep::Release((1, 5))]);
    assert_eq!((keeper.complete().collect(), keeper.given_up().collect()), (vec![6], vec![5]));
}

#[test]
fn what_another_group_has_given_up_goes_although_it_is_complete_in_this_one() {
    let mut keeper = one_of_two_groups();
    for step in [5, 6] {
        keeper.captured((1, step), 0);
        hear(&mut keeper, [peer(5, true), peer(6, true)].concat());
        keeper.advance(secs(0));
        keeper.encoded((1, step), true);
        assert_eq!(keeper.advance(secs(0)), [Keep::Publish, Keep::Complete((1, step))]);
    }
    keeper.short(Shortage::Store);
    assert!(keeper.advance(secs(100)).is_empty(), "there is nothing to ask the members of this group");
    keeper.given_up_elsewhere(2, &[5, 6]);
    assert!(keeper.advance(secs(100)).is_empty(), "of another generation");
    keeper.given_up_elsewhere(1, &[6]);
    assert_eq!(keeper.advance(secs(100)), [Keep::Publish, Keep::GiveUp((1, 6)), Keep::Release((1, 6))]);
    assert!(keeper.complete_everywhere((1, 5)).is_empty());
    keeper.given_up_elsewhere(1, &[5]);
    assert!(keeper.advance(secs(101)).is_empty() && keeper.keeps((1, 5)), "what is complete everywhere stays");
    // Hashing may take so long that the word of a step's end comes before the step.
    keeper.given_up_elsewhere(1, &[7]);
    keeper.captured((1, 7), 0);
    let all = keeper.advance(secs(102));
    assert_eq!(all, [Keep::GiveUp((1, 7)), Keep::Release((1, 7))], "nobody was told of it");
}

//! What becomes of snapshots in a job with several parity groups.
//!
//! A step is complete only when every group has it, and groups need not agree on which they can complete: one may give
//! up what another has. So each rank says at every step which steps are complete in its group and which its node has
//! given up, and from the same words all conclude the same: the newest step that all have, and those that nobody need
//! wait for any more.

use std::collections::BTreeSet;

/// Steps of a generation that a rank can have captured and not been given the slot of back, beside the live state.
pub const OPEN: usize = 2;
/// Steps given up that an agent is told of again: more than can be open.
const MOST_TOLD: usize = 4 * OPEN;

/// What one rank says of the steps of its generation; 0: none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Steps {
    /// Those that are complete in its parity group and still held.
    pub complete: [u64; OPEN],
    /// Those that its node gave up last.
    pub given_up: [u64; OPEN],
}

/// What all ranks' words come to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Agreed {
    /// The newest step that is complete in every group; 0: none.
    pub complete: u64,
    /// Newer ones that never will be, ascending.
    pub given_up: Vec<u64>,
}

impl Steps {
    /// The last few of each list.
    pub fn of(complete: &[u64], given_up: &[u64]) -> Self {
        let last = |steps: &[u64]| {
            let mut out = [0; OPEN];
            steps.iter().rev().zip(&mut out).for_each(|(step, place)| *place = *step);
            out
        };
        Self { complete: last(complete), given_up: last(given_up) }
    }

    /// The newest step that is complete in the group; 0: none.
    pub fn newest(&self) -> u64 {
        self.complete.into_iter().max().unwrap_or(0)
    }

    /// The numbers that travel.
    pub fn numbers(&self) -> [u64; 2 * OPEN] {
        let mut out = [0; 2 * OPEN];
        let numbers = self.complete.into_iter().chain(self.given_up);
        numbers.zip(&mut out).for_each(|(number, place)| *place = number);
        out
    }

    /// Reads them back.
    pub fn from_numbers(numbers: [u64; 2 * OPEN]) -> Self {
        let mut steps = Self::default();
        let places = steps.complete.iter_mut().chain(&mut steps.given_up);
        numbers.into_iter().zip(places).for_each(|(number, place)| *place = number);
        steps
    }
}

/// What follows from the words of all ranks.
pub fn agree<'a>(words: impl Iterator<Item = &'a Steps> + Clone) -> Agreed {
    let everywhere = |step: &u64| words.clone().all(|word| word.complete.contains(step));
    let first = words.clone().next().map_or([0; OPEN], |word| word.complete);
    let complete = first.into_iter().filter(everywhere).max().unwrap_or(0);
    let given_up: BTreeSet<u64> = words.flat_map(|word| word.given_up).filter(|step| *step > complete).collect();
    Agreed { complete, given_up: given_up.into_iter().collect() }
}

/// All that has been agreed on in a generation, as the agent is told it.
#[derive(Debug, Default)]
pub struct Verdicts {
    complete: u64,
    given_up: BTreeSet<u64>,
}

impl Verdicts {
    /// Takes in what was agreed on at a step; whether that is news.
    pub fn follow(&mut self, agreed: &Agreed) -> bool {
        let before = (self.complete, self.given_up.len(), self.given_up.last().copied());
        self.complete = self.complete.max(agreed.complete);
        self.given_up.extend(&agreed.given_up);
        self.given_up.retain(|step| *step > self.complete);
        while self.given_up.len() > MOST_TOLD {
            self.given_up.pop_first();
        }
        before != (self.complete, self.given_up.len(), self.given_up.last().copied())
    }

    /// The newest step that is complete in every group, if there is one.
    pub fn complete(&self) -> Vec<u64> {
        Some(self.complete).filter(|step| *step > 0).into_iter().collect()
    }

    /// Newer ones that never will be.
    pub fn given_up(&self) -> Vec<u64> {
        self.given_up.iter().copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn agreed(words: &[Steps]) -> (u64, Vec<u64>) {
        let Agreed { complete, given_up } = agree(words.iter());
        (complete, given_up)
    }

    #[test]
    fn a_step_is_complete_when_every_group_has_it() {
        let word = |complete: &[u64]| Steps::of(complete, &[]);
        assert_eq!(agreed(&[word(&[5]), word(&[5, 6])]).0, 5);
        assert_eq!(agreed(&[word(&[5, 6]), word(&[6])]).0, 6);
        assert_eq!(agreed(&[word(&[5]), word(&[6])]).0, 0, "one has given 5 up, the other does not have 6 yet");
        assert_eq!(agreed(&[word(&[5]), word(&[])]).0, 0);
        assert_eq!(agreed(&[]), (0, vec![]));
    }

    #[test]
    fn what_one_gives_up_all_hear_of_unless_it_does_not_matter_any_more() {
        let words = [Steps::of(&[6], &[3, 5]), Steps::of(&[5, 6], &[8, 7])];
        assert_eq!(agreed(&words), (6, vec![7, 8]));
        assert_eq!(Steps::of(&[], &[1, 2, 3]).given_up, [3, 2], "the last ones");
        assert_eq!(Steps::from_numbers(words[1].numbers()), words[1]);
    }

    #[test]
    fn verdicts_are_told_on_every_change() {
        let mut verdicts = Verdicts::default();
        let mut follow = |complete, given_up: &[u64]| {
            let news = verdicts.follow(&Agreed { complete, given_up: given_up.to_vec() });
            (news, verdicts.complete(), verdicts.given_up())
        };
        assert_eq!(follow(0, &[]), (false, vec![], vec![]));
        assert_eq!(follow(0, &[4, 5]), (true, vec![], vec![4, 5]));
        assert_eq!(follow(0, &[3]), (true, vec![], vec![3, 4, 5]));
        assert_eq!(follow(4, &[5]), (true, vec![4], vec![5]));
        assert_eq!(follow(0, &[3, 5]), (false, vec![4], vec![5]), "nothing is taken back");
        assert_eq!(follow(0, &(10..30).collect::<Vec<_>>()).2.len(), MOST_TOLD);
    }
}

//! The slots while they are being given out: what is free, who has what, what may be taken from whom.
//!
//! Slots are given and taken one at a time, each by the same few rules of preference, so a placement is a function of
//! its inputs and changes with them as little as possible.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use proto::ids::{JobName, NodeName};

use super::{Placement, Request, Share, Site, total};

/// How much may be taken from another job, the harmless first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Harm {
    /// Its spares.
    Spares,
    /// Also workers beyond its minimum.
    Surplus,
    /// All it has.
    Gang,
}

/// Nodes and how many slots of each may be given out.
type Open = Vec<(NodeName, u32)>;

/// What one job is to have.
#[derive(Debug)]
pub(super) struct Plan<'a> {
    pub(super) request: &'a Request,
    pub(super) workers: Placement,
    pub(super) spares: Placement,
    yields_to: Option<JobName>,
}

/// See the module header.
#[derive(Debug)]
pub(super) struct Board<'a> {
    sites: &'a BTreeMap<NodeName, Site>,
    free: Placement,
    /// In the order of service.
    pub(super) plans: Vec<Plan<'a>>,
    /// Nodes that are kept for an overdue job, from jobs behind it and from growth up to its priority.
    bars: Vec<(i32, BTreeSet<NodeName>)>,
}

fn take(placement: &mut Placement, node: &NodeName) {
    if let Some(workers) = placement.get_mut(node) {
        *workers -= 1;
        if *workers == 0 {
            placement.remove(node);
        }
    }
}

fn on(placement: &Placement, node: &NodeName) -> u32 {
    placement.get(node).copied().unwrap_or(0)
}

impl<'a> Board<'a> {
    /// Everybody has what they hold, on nodes that are there and fit, and no more than their maximum.
    pub(super) fn new(sites: &'a BTreeMap<NodeName, Site>, order: &[&'a Request]) -> Self {
        let free = sites.iter().map(|(node, site)| (node.clone(), site.slots)).collect();
        let mut board = Self { sites, free, plans: Vec::new(), bars: Vec::new() };
        for request in order {
            let workers = board.keep(request, &request.holds);
            board.plans.push(Plan { request, workers, spares: Placement::new(), yields_to: None });
            while total(&board.plans[board.plans.len() - 1].workers) > request.max {
                board.drop_worker(board.plans.len() - 1, |_| true);
            }
        }
        // Spares give way where a node has become too small for all.
        for at in 0..board.plans.len() {
            let request = board.plans[at].request;
            board.plans[at].spares = board.keep(request, &request.reserve);
            while total(&board.plans[at].spares) > request.spares {
                board.drop_spare(at, |_| true);
            }
            if !request.firm {
                board.promote(at, total(&request.holds).min(request.max));
            }
        }
        board
    }

    fn keep(&mut self, request: &Request, held: &Placement) -> Placement {
        let mut kept = Placement::new();
        for (node, &held) in held.iter().filter(|(node, _)| !request.refused.contains(*node)) {
            let Some(slots) = self.free.get_mut(node) else { continue };
            let workers = held.min(*slots);
            if workers > 0 {
                *slots -= workers;
                kept.insert(node.clone(), workers);
            }
        }
        kept
    }

    /// Whether a job may use a node for something new.
    fn usable(&self, at: usize, node: &NodeName) -> bool {
        let request = self.plans[at].request;
        let barred = self.bars.iter().any(|(priority, nodes)| *priority >= request.priority && nodes.contains(node));
        !barred && !request.refused.contains(node)
    }

    /// Free slots a job may use.
    pub(super) fn room(&self, at: usize) -> u32 {
        let usable = self.free.iter().filter(|(node, _)| self.usable(at, node));
        usable.fold(0, |sum: u32, (_, slots)| sum.saturating_add(*slots))
    }

    /// Whether all nodes together, empty, could run the job.
    pub(super) fn could_ever_fit(&self, at: usize) -> bool {
        let request = self.plans[at].request;
        let fitting = self.sites.iter().filter(|(node, _)| !request.refused.contains(*node));
        fitting.fold(0, |sum: u32, (_, site)| sum.saturating_add(site.slots)) >= request.min
    }

    /// Nothing is kept from anybody.
    pub(super) fn unbar(&mut self) {
        self.bars.clear();
    }

    /// Keeps all nodes a job could use from those behind it.
    pub(super) fn bar(&mut self, at: usize) {
        let request = self.plans[at].request;
        let nodes = self.sites.keys().filter(|node| !request.refused.contains(*node)).cloned().collect();
        self.bars.push((request.priority, nodes));
    }

    /// Gives a job free slots until it has `target` workers or there are no more: where it was, then rack by rack.
    pub(super) fn fill(&mut self, at: usize, target: u32) {
        let plan = &self.plans[at];
        let lost = |node: &NodeName| on(&plan.request.holds, node).saturating_sub(on(&plan.workers, node));
        let home: Open = self
            .free
            .iter()
            .filter(|(node, _)| self.usable(at, node))
            .map(|(node, slots)| (node.clone(), lost(node).min(*slots)))
            .collect();
        self.spread(at, target, home);
        while total(&self.plans[at].workers) < target {
            let Some(rack) = self.best_rack(at) else { return };
            self.spread(at, target, rack);
        }
    }

    /// Adds workers one by one, on the node of these with the fewest of the job's own, then with the most free slots.
    fn spread(&mut self, at: usize, target: u32, nodes: Open) {
        let plan = &mut self.plans[at];
        let mut left = target.saturating_sub(total(&plan.workers));
        let entry = |(node, slots): (NodeName, u32)| (on(&plan.workers, &node), Reverse(slots), node);
        let mut queue: BTreeSet<_> = nodes.into_iter().filter(|(_, slots)| *slots > 0).map(entry).collect();
        while left > 0
            && let Some((own, Reverse(slots), node)) = queue.pop_first()
        {
            take(&mut self.free, &node);
            *plan.workers.entry(node.clone()).or_default() += 1;
            left -= 1;
            if slots > 1 {
                queue.insert((own + 1, Reverse(slots - 1), node));
            }
        }
    }

    /// The free slots of the rack that suits the next workers of a job: a rack it is in, with the most of its workers;
    /// or the smallest with room for all it may want; or the roomiest.
    fn best_rack(&self, at: usize) -> Option<Open> {
        let plan = &self.plans[at];
        let wish = plan.request.max.saturating_sub(total(&plan.workers));
        let mut racks: BTreeMap<&str, (u32, Open)> = BTreeMap::new();
        for (node, site) in self.sites {
            let (own, open) = racks.entry(&site.rack).or_default();
            *own += on(&plan.workers, node);
            let slots = on(&self.free, node);
            if slots > 0 && self.usable(at, node) {
                open.push((node.clone(), slots));
            }
        }
        let order = |own: u32, open: &[(NodeName, u32)]| {
            let room = open.iter().fold(0, |sum: u32, (_, slots)| sum.saturating_add(*slots));
            match (own, room >= wish) {
                (0, true) => (1, Reverse(0), room),
                (0, false) => (2, Reverse(room), 0),
                (own, _) => (0, Reverse(own), 0),
            }
        };
        let open = racks.into_iter().filter(|(_, (_, open))| !open.is_empty());
        open.min_by_key(|(rack, (own, open))| (order(*own, open), *rack)).map(|(_, (_, open))| open)
    }

    /// Adds a spare: best on a node without workers of the job, and with few spares, in a rack where it has workers.
    pub(super) fn add_spare(&mut self, at: usize) -> bool {
        let plan = &self.plans[at];
        let rack = |node: &NodeName| self.sites.get(node).map(|site| site.rack.as_str());
        let racks: BTreeSet<_> = plan.workers.keys().map(rack).collect();
        let order = |node: &NodeName, slots: u32| {
            let was_here = on(&plan.request.reserve, node) > on(&plan.spares, node);
            let (occupied, near) = (plan.workers.contains_key(node), racks.contains(&rack(node)));
            (occupied, !was_here, on(&plan.spares, node), !near, Reverse(slots))
        };
        let open = self.free.iter().filter(|(node, slots)| **slots > 0 && self.usable(at, node));
        let best = open.min_by_key(|(node, slots)| (order(node, **slots), *node));
        let Some(node) = best.map(|(node, _)| node.clone()) else { return false };
        take(&mut self.free, &node);
        *self.plans[at].spares.entry(node).or_default() += 1;
        true
    }

    /// Spares take the places of workers that are gone, up to `workers` of them.
    pub(super) fn promote(&mut self, at: usize, workers: u32) {
        while total(&self.plans[at].workers) < workers {
            let plan = &self.plans[at];
            let fewest = plan.spares.keys().min_by_key(|node| on(&plan.workers, node)).cloned();
            let Some(node) = fewest else { return };
            take(&mut self.plans[at].spares, &node);
            *self.plans[at].workers.entry(node).or_default() += 1;
        }
    }

    /// Takes one worker away where the job can best do without: in the rack with the fewest of its workers, from the
    /// node with the most.
    fn drop_worker(&mut self, at: usize, may: impl Fn(&NodeName) -> bool) -> bool {
        let plan = &self.plans[at];
        let rack = |node: &NodeName| self.sites.get(node).map_or("", |site| site.rack.as_str());
        let mut racks: BTreeMap<&str, u32> = BTreeMap::new();
        for (node, workers) in &plan.workers {
            *racks.entry(rack(node)).or_default() += workers;
        }
        let order = |node: &NodeName, workers: u32| (racks.get(rack(node)).copied(), Reverse(workers));
        let of_use = plan.workers.iter().filter(|(node, _)| may(node));
        let least = of_use.min_by_key(|(node, workers)| (order(node, **workers), Reverse(*node)));
        let Some(node) = least.map(|(node, _)| node.clone()) else { return false };
        take(&mut self.plans[at].workers, &node);
        *self.free.entry(node).or_default() += 1;
        true
    }

    fn drop_spare(&mut self, at: usize, may: impl Fn(&NodeName) -> bool) -> bool {
        let last = self.plans[at].spares.keys().rfind(|node| may(node)).cloned();
        let Some(node) = last else { return false };
        take(&mut self.plans[at].spares, &node);
        *self.free.entry(node).or_default() += 1;
        true
    }

    /// Gives back all a job has. `false`: it had nothing.
    pub(super) fn release_all(&mut self, at: usize) -> bool {
        let plan = &mut self.plans[at];
        let all = std::mem::take(&mut plan.spares).into_iter().chain(std::mem::take(&mut plan.workers));
        let mut any = false;
        for (node, slots) in all {
            *self.free.entry(node).or_default() += slots;
            any = true;
        }
        any
    }

    /// How many slots a job may take from another, on nodes it can use.
    fn available(&self, victim: usize, harm: Harm, may: impl Fn(&NodeName) -> bool) -> u32 {
        let plan = &self.plans[victim];
        let count = |placement: &Placement| -> u32 {
            placement.iter().filter(|(node, _)| may(node)).map(|(_, workers)| workers).sum()
        };
        let workers = count(&plan.workers);
        let surplus = total(&plan.workers).saturating_sub(plan.request.min);
        count(&plan.spares)
            + match harm {
                Harm::Spares => 0,
                Harm::Surplus => workers.min(surplus),
                Harm::Gang => workers,
            }
    }

    /// How much a job may take from another at most.
    fn allowance(&self, at: usize, victim: usize) -> Option<Harm> {
        let (mine, theirs) = (self.plans[at].request, self.plans[victim].request);
        match theirs.priority.cmp(&mine.priority) {
            _ if at == victim || theirs.firm => None,
            std::cmp::Ordering::Less => Some(Harm::Gang),
            std::cmp::Ordering::Equal if mine.overdue => Some(Harm::Surplus),
            _ => None,
        }
    }

    fn usable_nodes(&self, at: usize) -> BTreeSet<NodeName> {
        self.sites.keys().filter(|node| self.usable(at, node)).cloned().collect()
    }

    /// Takes from others what is lacking to `need` free slots, if all that may be taken is enough.
    pub(super) fn reclaim(&mut self, at: usize, need: u32) {
        let nodes = self.usable_nodes(at);
        let may = |node: &NodeName| nodes.contains(node);
        let victims: Vec<(usize, Harm)> =
            (0..self.plans.len()).rev().filter_map(|victim| Some((victim, self.allowance(at, victim)?))).collect();
        let most = victims.iter().map(|(victim, harm)| self.available(*victim, *harm, may));
        if self.room(at) >= need || most.fold(self.room(at), u32::saturating_add) < need {
            return;
        }
        for harm in [Harm::Spares, Harm::Surplus, Harm::Gang] {
            for (victim, _) in victims.iter().filter(|(_, most)| *most >= harm) {
                while self.room(at) < need && self.available(*victim, harm, may) > 0 {
                    self.take_from(at, *victim, harm, &nodes);
                }
            }
        }
    }

    /// Takes one slot from a job of lower priority: a spare, or a worker beyond its minimum. `false`: there is none.
    pub(super) fn take_one(&mut self, at: usize) -> bool {
        let nodes = self.usable_nodes(at);
        let mine = self.plans[at].request;
        let lower = |victim: &usize| {
            let theirs = self.plans[*victim].request;
            theirs.priority < mine.priority && !theirs.firm
        };
        let victims: Vec<usize> = (0..self.plans.len()).rev().filter(lower).collect();
        for harm in [Harm::Spares, Harm::Surplus] {
            let of_use = |victim: &&usize| self.available(**victim, harm, |node| nodes.contains(node)) > 0;
            if let Some(&victim) = victims.iter().find(of_use) {
                self.take_from(at, victim, harm, &nodes);
                return true;
            }
        }
        false
    }

    fn take_from(&mut self, at: usize, victim: usize, harm: Harm, nodes: &BTreeSet<NodeName>) {
        let may = |node: &NodeName| nodes.contains(node);
        if harm == Harm::Gang {
            self.release_all(victim);
        } else if !self.drop_spare(victim, may) {
            self.drop_worker(victim, may);
        }
        let job = &self.plans[at].request.job;
        self.plans[victim].yields_to.get_or_insert_with(|| job.clone());
    }

    /// What each job gets now: all of its plan where it is already, and more when the slots for it are really free.
    pub(super) fn grant(self) -> BTreeMap<JobName, Share> {
        let mut free: Placement = self.sites.iter().map(|(node, site)| (node.clone(), site.slots)).collect();
        let mut shares: Vec<Share> = self.plans.iter().map(Plan::at_home).collect();
        for (plan, share) in self.plans.iter().zip(&shares) {
            for (node, slots) in &mut free {
                let told = on(&share.workers, node).saturating_add(on(&share.spares, node));
                *slots = slots.saturating_sub(told.max(on(&plan.request.bound, node)));
            }
        }
        for (plan, share) in self.plans.iter().zip(&mut shares) {
            let lacks = |node: &NodeName, workers: u32| workers.saturating_sub(on(&share.workers, node));
            let more: Placement = plan.workers.iter().map(|(node, &all)| (node.clone(), lacks(node, all))).collect();
            // Growing by and by would cost a new generation each time.
            if more.iter().all(|(node, more)| *more <= on(&free, node)) {
                for (node, more) in more {
                    *free.entry(node).or_default() -= more;
                }
                share.workers.clone_from(&plan.workers);
            }
        }
        for (plan, share) in self.plans.iter().zip(&mut shares) {
            for (node, &spares) in &plan.spares {
                let more = spares.saturating_sub(on(&share.spares, node)).min(on(&free, node));
                if more > 0 {
                    *share.spares.entry(node.clone()).or_default() += more;
                    *free.entry(node.clone()).or_default() -= more;
                }
            }
            let kept = plan.request.holds.iter().all(|(node, held)| on(&share.workers, node) >= *held);
            share.yields_to.take_if(|_| kept);
        }
        self.plans.iter().zip(shares).map(|(plan, share)| (plan.request.job.clone(), share)).collect()
    }
}

impl Plan<'_> {
    /// The part of the plan for which the job has the slots: what was a spare may have become a worker.
    fn at_home(&self) -> Share {
        let (mut workers, mut spares) = (Placement::new(), Placement::new());
        let nodes: BTreeSet<&NodeName> = self.workers.keys().chain(self.spares.keys()).collect();
        for node in nodes {
            let mine = on(&self.request.holds, node).saturating_add(on(&self.request.reserve, node));
            let working = on(&self.workers, node).min(mine);
            let spare = on(&self.spares, node).min(mine - working);
            workers.extend((working > 0).then(|| (node.clone(), working)));
            spares.extend((spare > 0).then(|| (node.clone(), spare)));
        }
        Share { workers, spares, yields_to: self.yields_to.clone() }
    }
}

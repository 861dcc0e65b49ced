//! Which nodes an operator keeps empty: a chain of its own beside the jobs', so that it outlives coordinators.
//!
//! Each record holds the whole set, so the newest says everything. As with the jobs' chains, adding to it is a
//! conditional create of the next number, and names count down. A new leader's first record repeats the set under its
//! own epoch: whoever led before loses every later create, and finds by whose record.

use std::collections::BTreeSet;

use proto::ids::{Epoch, NodeName};
use serde::{Deserialize, Serialize};

use crate::backend::{Create, Store};
use crate::chain;
use crate::error::{Kind, StoreError, parse_json};
use crate::layout;

/// The version of these records.
pub const NODES_FORMAT: u32 = 1;
/// A record larger than this is refused unread.
pub(crate) const MAX_NODES: u64 = 8 << 20;
/// Creates that may be lost one after the other, to what leaders before had under way, before that is an error.
const TRIES: usize = 16;

/// The nodes as one leader recorded them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodesRecord {
    /// [`NODES_FORMAT`].
    pub format: u32,
    /// Its place in the chain, from 0.
    pub number: u64,
    /// The author's leader epoch.
    pub epoch: Epoch,
    /// Those that are to be empty.
    pub drained: BTreeSet<NodeName>,
}

impl NodesRecord {
    /// Reads a record; `path` is for messages, and `number` what its name says.
    pub fn parse(path: &str, number: u64, bytes: &[u8]) -> Result<Self, StoreError> {
        let record: Self = parse_json(path, bytes, NODES_FORMAT)?;
        if record.number != number {
            let found = record.number;
            return Err(StoreError::Corrupt(format!("{path} says it is record {found}, its name says {number}")));
        }
        Ok(record)
    }
}

/// A leader's hold on the chain.
#[derive(Debug)]
pub struct NodeBook {
    store: Store,
    epoch: Epoch,
    /// The number of the next record.
    next: u64,
    drained: BTreeSet<NodeName>,
    /// Whether it may be unknown what the last create has done.
    unclear: bool,
}

impl NodeBook {
    /// Reads what leaders before this one have recorded, and takes the chain over.
    pub async fn take_over(store: &Store, epoch: Epoch) -> Result<Self, StoreError> {
        let newest = chain::newest(store, layout::NODES, layout::nodes_number).await?;
        let mut book =
            Self { store: store.clone(), epoch, next: newest.unwrap_or(0), drained: BTreeSet::new(), unclear: true };
        book.write(None).await?;
        Ok(book)
    }

    /// The nodes that are to be empty.
    pub fn drained(&self) -> &BTreeSet<NodeName> {
        &self.drained
    }

    /// Records that these nodes are to be empty, and no others. [`Kind::Fenced`]: a newer leader has taken over.
    pub async fn record(&mut self, drained: BTreeSet<NodeName>) -> Result<(), StoreError> {
        self.write(Some(drained)).await
    }

    /// Appends the set, or for a leader that begins what it finds.
    async fn write(&mut self, drained: Option<BTreeSet<NodeName>>) -> Result<(), StoreError> {
        for _ in 0..TRIES {
            if self.unclear {
                self.refresh().await?;
            }
            let (number, drained) = (self.next, drained.clone().unwrap_or_else(|| self.drained.clone()));
            let path = layout::nodes(number);
            let record = NodesRecord { format: NODES_FORMAT, number, epoch: self.epoch, drained };
            let bytes = serde_json::to_vec(&record).map_err(|error| StoreError::Bug(format!("{path}: {error}")))?;
            // Set first: if this future is dropped half-way, the outcome is unknown.
            self.unclear = true;
            match self.store.create(&path, bytes.into()).await {
                Ok(Create::Created) => {
                    (self.next, self.drained, self.unclear) = (number + 1, record.drained, false);
                    return Ok(());
                }
                // Its author is known once it has been read.
                Ok(Create::AlreadyExists) => {}
                Err(error) if error.kind() == Kind::Retry => return Err(error),
                Err(error) => {
                    self.unclear = false;
                    return Err(error);
                }
            }
        }
        Err(StoreError::Fenced(format!("{} goes to others again and again", layout::nodes(self.next))))
    }

    /// Reads what was added, by an append without a clear answer or by others.
    async fn refresh(&mut self) -> Result<(), StoreError> {
        loop {
            let path = layout::nodes(self.next);
            let bytes = match self.store.get(&path, MAX_NODES).await {
                Ok(bytes) => bytes,
                Err(error) if error.is_not_found() => break,
                Err(error) => return Err(error),
            };
            let record = NodesRecord::parse(&path, self.next, &bytes)?;
            if record.epoch > self.epoch {
                let why = format!("{path} was written in epoch {}, this leader's is {}", record.epoch, self.epoch);
                return Err(StoreError::Fenced(why));
            }
            (self.next, self.drained) = (self.next + 1, record.drained);
        }
        self.unclear = false;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nodes(names: &[&str]) -> BTreeSet<NodeName> {
        names.iter().map(|name| NodeName::new(*name).unwrap()).collect()
    }

    #[tokio::test]
    async fn what_one_leader_records_the_next_one_knows() {
        let store = Store::memory();
        let mut first = NodeBook::take_over(&store, Epoch::new(1)).await.unwrap();
        assert!(first.drained().is_empty());
        first.record(nodes(&["a", "b"])).await.unwrap();
        first.record(nodes(&["b"])).await.unwrap();
        let mut second = NodeBook::take_over(&store, Epoch::new(4)).await.unwrap();
        assert_eq!(*second.drained(), nodes(&["b"]));
        // The one before was only asleep, and does not know yet.
        let fenced = first.record(nodes(&["c"])).await.unwrap_err();
        assert_eq!(fenced.kind(), Kind::Fenced, "{fenced}");
        assert!(fenced.to_string().contains("epoch 4"), "{fenced}");
        assert_eq!(NodeBook::take_over(&store, Epoch::new(2)).await.unwrap_err().kind(), Kind::Fenced);
        second.record(nodes(&["b", "c"])).await.unwrap();
        assert_eq!(*NodeBook::take_over(&store, Epoch::new(5)).await.unwrap().drained(), nodes(&["b", "c"]));
    }

    #[tokio::test]
    async fn what_a_leader_before_had_under_way_may_still_land_but_counts_no_more() {
        let store = Store::memory();
        let mut first = NodeBook::take_over(&store, Epoch::new(1)).await.unwrap();
        let mut second = NodeBook::take_over(&store, Epoch::new(2)).await.unwrap();
        let late = NodesRecord { format: 1, number: 2, epoch: Epoch::new(1), drained: nodes(&["z"]) };
        store.create(&layout::nodes(2), serde_json::to_vec(&late).unwrap().into()).await.unwrap();
        second.record(nodes(&["a"])).await.unwrap();
        assert_eq!(second.next, 4);
        assert_eq!(first.record(nodes(&[])).await.unwrap_err().kind(), Kind::Fenced);
        assert_eq!(*NodeBook::take_over(&store, Epoch::new(3)).await.unwrap().drained(), nodes(&["a"]));
    }

    /// The form in the store, which another build reads.
    #[test]
    fn the_format_is_what_it_was() {
        let text = r#"{"format":1,"number":7,"epoch":3,"drained":["gpu-1","gpu-2"]}"#;
        let record = NodesRecord::parse("r", 7, text.as_bytes()).unwrap();
        assert_eq!(record.drained, nodes(&["gpu-1", "gpu-2"]));
        assert_eq!(serde_json::to_string(&record).unwrap(), text);
        let kind = |text: &str, number| NodesRecord::parse("r", number, text.as_bytes()).unwrap_err().kind();
        assert_eq!(kind(text, 8), Kind::Corrupt);
        assert_eq!(kind(&text.replace("\"format\":1", "\"format\":2"), 7), Kind::Input, "a newer format");
        assert_eq!(kind(&text.replace("gpu-1", "../x"), 7), Kind::Corrupt, "no name of a node");
    }
}

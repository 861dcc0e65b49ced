//! Mistakes planted into the surroundings of the product, to see that the simulation notices.

/// A planted mistake.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plant {
    /// The store ignores the condition of a create: two leaders win one epoch, two records one number.
    Overwrites,
    /// The store says that a record is there a while before it is.
    AcknowledgesEarly,
    /// Workers go on in a generation they were told to leave.
    IgnoresHold,
    /// Workers take the rank after their own.
    WrongRank,
    /// What a step computes depends on the number of workers.
    Impure,
    /// An agent takes an order of a superseded coordinator for one of its successor.
    OldOrders,
    /// Workers break off every generation soon after its beginning.
    NeverThere,
}

impl Plant {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Overwrites,
        Self::AcknowledgesEarly,
        Self::IgnoresHold,
        Self::WrongRank,
        Self::Impure,
        Self::OldOrders,
        Self::NeverThere,
    ];

    /// Words of the violations it must be noticed by.
    pub fn signs(self) -> &'static [&'static str] {
        match self {
            Self::Overwrites => &["was replaced", "belongs", "may not write"],
            Self::AcknowledgesEarly => &["before the chain says so"],
            Self::IgnoresHold => &["a fenced generation lives"],
            Self::WrongRank => &["two live workers", "the chain gives that rank to"],
            Self::Impure => &["committed twice", "not the state of an undisturbed run"],
            Self::OldOrders => &["two coordinators obeyed"],
            Self::NeverThere => &["no progress"],
        }
    }
}

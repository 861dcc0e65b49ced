//! What comes to a worker from its data files and from the ring's port, under attack; see the harness.

#[path = "../../checkpoint-store/tests/hostile/harness.rs"]
mod harness;

use harness::{Allowance, Counting, withstand};
use worker::hostile;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const USUAL: Allowance = Allowance { fixed: 64 << 10, each: 64 };

macro_rules! targets {
    ($($name:ident)*) => {
        $(
            #[test]
            fn $name() {
                withstand(stringify!($name), hostile::$name, USUAL, 30_000);
            }
        )*

        #[test]
        fn none_is_forgotten() {
            let tested = [$(stringify!($name)),*];
            assert_eq!(tested.to_vec(), hostile::TARGETS.map(|(name, _)| name).to_vec());
        }
    };
}

targets! { dataset frame greeting }

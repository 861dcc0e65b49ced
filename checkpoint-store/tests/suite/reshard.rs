//! Saved by any number of workers, loaded by any other, bit for bit.

use checkpoint_store::*;
use proptest::prelude::*;
use proto::ids::{Generation, Rank, Step};
use safetensors::SafeTensors;

use crate::support::*;

#[tokio::test]
async fn every_size_gives_the_same_digest_and_loads_at_every_size() {
    let space = medium();
    let mut digests = vec![];
    for save_at in [1, 2, 3, 5, 9] {
        let store = Store::memory();
        let mut chain = running(&store, save_at).await;
        let checkpoint = save(&mut chain, &space, 50).await;
        for load_at in [1, 2, 4, 7] {
            expect_loads(&store, &checkpoint, &space, load_at).await;
        }
        assert!(verify(&store, &job(), &checkpoint).await.unwrap().is_good());
        digests.push(checkpoint.digest);
    }
    assert!(digests.windows(2).all(|d| d[0] == d[1]), "{digests:?}");
}

/// Every object opens as safetensors, and the slices put together by their names are the trained state.
#[tokio::test]
async fn objects_are_plain_safetensors_that_reassemble_by_name() {
    let (store, space) = (Store::memory(), medium());
    let mut chain = running(&store, 3).await;
    let checkpoint = save(&mut chain, &space, 50).await;
    let manifest = open_checkpoint(&store, &job(), &checkpoint).await.unwrap();
    let mut whole = vec![vec![0u8; space.elements() as usize * 4]; 3];
    for object in &manifest.objects {
        let file = store.get(&object.path, 1 << 30).await.unwrap();
        let opened = SafeTensors::deserialize(&file).unwrap();
        let (_, metadata) = SafeTensors::read_metadata(&file).unwrap();
        let metadata = metadata.metadata().clone().unwrap();
        assert_eq!(metadata["cairn.format"], "1");
        let shapes: std::collections::BTreeMap<String, Vec<u64>> =
            serde_json::from_str(&metadata["cairn.shapes"]).unwrap();
        for (name, view) in opened.tensors() {
            let (state, rest) = name.split_once('/').unwrap();
            let (tensor, first) = rest.rsplit_once('@').unwrap();
            let (decl, range) = space.tensor_ranges().find(|(t, _)| t.name == tensor).unwrap();
            assert_eq!(shapes[tensor], decl.shape);
            let at = (range.start + first.parse::<u64>().unwrap()) as usize * 4;
            let all = &mut whole[manifest.state_index(state).unwrap()];
            all[at..at + view.data().len()].copy_from_slice(view.data());
        }
    }
    for (state, all) in whole.iter().enumerate() {
        assert!(*all == values(&space, state, 50), "state {state}");
    }
}

#[tokio::test]
async fn a_set_of_receipts_must_be_complete_and_of_one_state() {
    let (store, space) = (Store::memory(), medium());
    let good = receipts(&store, &space, 1, 3, 50).await;
    let assemble = |receipts: Vec<Receipt>| Manifest::assemble(&space, scalar(50), receipts);
    let twice = [good.clone(), good.clone()].concat();
    assert_eq!(assemble(twice).unwrap(), assemble(good.clone()).unwrap());
    assert_eq!(assemble(vec![]), Err(AssembleError::Empty));
    for missing in 0..3 {
        let mut some = good.clone();
        some.remove(missing);
        let error = assemble(some).unwrap_err();
        assert!(matches!(error, AssembleError::Incomplete { missing: m, .. } if m.index() == missing), "{error}");
    }
    let altered = |change: fn(&mut Receipt)| {
        let mut receipts = good.clone();
        change(&mut receipts[1]);
        assemble(receipts).unwrap_err().to_string()
    };
    assert!(altered(|r| r.generation = Generation::new(2)).contains("the generation"));
    assert!(altered(|r| r.scalar.step = Step::new(51)).contains("the step"));
    assert!(altered(|r| r.scalar.cursor = 1).contains("the scalar state"));
    assert!(altered(|r| r.shard.1 += 1).contains("its shard"));
    assert!(altered(|r| r.hashes[2].0.truncate(0)).contains("hashes"));
    assert!(altered(|r| r.object = None).contains("stored no object"));
    assert!(altered(|r| r.object.as_mut().unwrap().extents[0].first = 0).contains("does not hold its shard"));
    assert!(altered(|r| r.rank = Rank::new(7)).contains("missing is 1"));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]
    #[test]
    fn any_range_loads_bitwise(
        sizes in proptest::collection::vec(1u64..150_000, 1..6),
        workers in 1u32..8,
        cuts in proptest::collection::vec((0.0f64..1.0, 0.0f64..1.0), 4),
    ) {
        tokio::runtime::Runtime::new().unwrap().block_on(async {
            let (store, space) = (Store::memory(), space(&sizes));
            let mut chain = running(&store, workers).await;
            let checkpoint = save(&mut chain, &space, 3).await;
            let manifest = open_checkpoint(&store, &job(), &checkpoint).await.unwrap();
            let all = values(&space, 1, 3);
            for (a, b) in cuts {
                let at = |x: f64| (x * space.elements() as f64) as u64;
                let range = at(a.min(b))..at(a.max(b));
                let mut out = vec![0; 4 * (range.end - range.start) as usize];
                read_range(&store, &manifest, "exp_avg", range.clone(), &mut out).await.unwrap();
                assert!(out == all[range.start as usize * 4..range.end as usize * 4], "{range:?}");
                let mut read: Vec<_> = plan(&manifest, 1, range).into_iter().flat_map(|r| r.blocks).collect();
                let count = read.len();
                read.dedup();
                assert_eq!(read.len(), count, "no block is read twice");
            }
        });
    }
}

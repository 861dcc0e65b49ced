//! Boxes of tensors: every layout to every other, and what damage and malice do.

use std::collections::BTreeMap;

use bytes::Bytes;
use checkpoint_store::tensors::*;
use checkpoint_store::*;
use proto::ids::{Generation, Rank, Step};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::support::*;

/// How ranks cut tensors.
#[derive(Debug, Clone, Copy)]
enum Cut {
    Flat,
    Rows,
    Columns,
    Grid(u64),
    Replicated,
}

/// A model in the shape of a transformer; `width` 512 makes it 21 million parameters.
fn model(width: u64) -> Catalog {
    let mut tensors = vec![TensorInfo::new("embed", ElementType::F32, [16 * width, width])];
    for layer in 0..4 {
        let mut add = |name: &str, dtype, shape: &[u64]| {
            tensors.push(TensorInfo::new(format!("layers.{layer}.{name}"), dtype, shape));
        };
        add("qkv", ElementType::F32, &[3, width, width]);
        add("out", ElementType::Bf16, &[width, width]);
        add("up", ElementType::F32, &[4 * width, width]);
        add("down", ElementType::F32, &[width, 4 * width]);
        add("norm", ElementType::F32, &[width]);
    }
    tensors.push(TensorInfo::new("steps", ElementType::I64, []));
    tensors.push(TensorInfo::new("head", ElementType::F32, [16 * width, width]));
    Catalog::new(tensors).unwrap()
}

/// The bytes of a whole tensor: different everywhere.
fn contents(catalog: &Catalog, tensor: usize) -> Vec<u8> {
    let info = &catalog.tensors()[tensor];
    let bytes = info.shape.iter().product::<u64>() * info.dtype.size();
    let word = |i: u64| (i ^ (tensor as u64) << 40).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes();
    let mut all: Vec<u8> = (0..bytes.div_ceil(8)).flat_map(word).collect();
    all.truncate(bytes as usize);
    all
}

/// Cuts one dimension evenly.
fn along(length: u64, part: u64, parts: u64) -> (u64, u64) {
    let (start, end) = (length * part / parts, length * (part + 1) / parts);
    (start, end - start)
}

/// What each of `world` ranks has of the tensors.
fn boxes(catalog: &Catalog, cut: Cut, world: u64) -> Vec<Vec<BoxPiece>> {
    let of_rank = |rank: u64| {
        if let Cut::Flat = cut {
            let (start, length) = along(catalog.elements(), rank, world);
            let pieces = catalog.flat_pieces(start..start + length).into_iter();
            return pieces.map(|(t, region)| BoxPiece { tensor: catalog.tensors()[t].name.clone(), region }).collect();
        }
        let cut_of = |info: &TensorInfo| {
            let (mut offsets, mut lengths) = (vec![0; info.shape.len()], info.shape.clone());
            let mut part = |d: usize, part, parts| (offsets[d], lengths[d]) = along(info.shape[d], part, parts);
            match (cut, info.shape.len()) {
                (Cut::Rows, 1..) => part(0, rank, world),
                (Cut::Columns, n @ 2..) => part(n - 1, rank, world),
                (Cut::Grid(columns), n @ 2..) => {
                    part(n - 2, rank / columns, world / columns);
                    part(n - 1, rank % columns, columns);
                }
                _ => {}
            }
            (!lengths.contains(&0)).then(|| BoxPiece::new(info.name.clone(), &offsets, &lengths).unwrap())
        };
        catalog.tensors().iter().filter_map(cut_of).collect()
    };
    (0..world).map(of_rank).collect()
}

struct Model {
    catalog: Catalog,
    contents: Vec<Vec<u8>>,
}

impl Model {
    fn new(width: u64) -> Self {
        let catalog = model(width);
        Self { contents: (0..catalog.tensors().len()).map(|t| contents(&catalog, t)).collect(), catalog }
    }

    fn bytes(&self, piece: &BoxPiece) -> Vec<u8> {
        let at = self.catalog.find(&piece.tensor).unwrap();
        let info = &self.catalog.tensors()[at];
        let whole = BoxPiece::whole(info).unwrap().region;
        let mut out = vec![0; (piece.region.elements() * info.dtype.size()) as usize];
        let from = (&self.contents[at][..], &whole);
        copy_region(from, (&mut out, &piece.region), &piece.region, info.dtype.size()).unwrap();
        out
    }

    fn described(&self, cut: Cut, world: u64) -> Vec<Description> {
        let all = boxes(&self.catalog, cut, world).into_iter();
        (0..).map(Rank::new).zip(all).map(|(rank, pieces)| Description { rank, pieces }).collect()
    }

    async fn receipts(&self, store: &Store, plan: &SavePlan, held: &[Description]) -> Vec<TensorReceipt> {
        let mut receipts = vec![];
        for own in held {
            let data = own.pieces.iter().map(|piece| Bytes::from(self.bytes(piece))).collect();
            let (step, generation) = (Step::new(9), Generation::new(1));
            let source = TensorSource { job: job(), step, generation, rank: own.rank, data };
            let receipt = upload_boxes(store, plan, &source, Uuid::new_v4()).await.unwrap();
            assert_eq!(TensorReceipt::from_json(&receipt.to_json().unwrap()).unwrap(), receipt);
            receipts.push(receipt);
        }
        receipts
    }

    async fn save(&self, chain: &mut Chain, cut: Cut, world: u64) -> (TensorRef, f64) {
        let held = self.described(cut, world);
        let plan = SavePlan::new(&self.catalog, &held).unwrap();
        let store = chain.store().clone();
        let receipts = self.receipts(&store, &plan, &held).await;
        let manifest = TensorManifest::assemble(&plan, receipts, BTreeMap::new()).unwrap();
        let checkpoint = commit_tensors(chain, &manifest, EPOCH, Uuid::new_v4()).await.unwrap();
        assert_eq!(commit_tensors(chain, &manifest, EPOCH, Uuid::new_v4()).await.unwrap(), checkpoint);
        (checkpoint, plan.max_over_mean())
    }

    /// Loads as `world` ranks and compares every byte; returns bytes read over bytes needed, and the balance.
    async fn load(&self, reader: &Reader, cut: Cut, world: u64) -> (f64, f64) {
        let wanted = boxes(&self.catalog, cut, world);
        let plan = LoadPlan::new(reader, &wanted, LoadOptions::default()).unwrap();
        let size = |piece: &BoxPiece| self.bytes(piece).len();
        let mut buffers: Vec<Vec<Vec<u8>>> =
            wanted.iter().map(|own| own.iter().map(|piece| vec![0; size(piece)]).collect()).collect();
        let mut parcels = vec![];
        for (rank, own) in (0..).map(Rank::new).zip(&mut buffers) {
            let mut own: Vec<&mut [u8]> = own.iter_mut().map(Vec::as_mut_slice).collect();
            let keep = |parcel: Parcel| {
                parcels.push(parcel);
                Ok(())
            };
            plan.run(reader, rank, &mut own, keep).await.unwrap();
        }
        for parcel in &parcels {
            let own = &mut buffers[parcel.to.index()];
            let mut own: Vec<&mut [u8]> = own.iter_mut().map(Vec::as_mut_slice).collect();
            plan.place(reader, parcel.to, parcel, &mut own).unwrap();
        }
        for (pieces, own) in wanted.iter().zip(&buffers) {
            for (piece, found) in pieces.iter().zip(own) {
                assert!(*found == self.bytes(piece), "{cut:?} of {world}: {} of {}", piece.region, piece.tensor);
            }
        }
        assert_eq!(plan.bytes_needed(), self.catalog.bytes());
        (plan.ratio(), plan.max_over_mean())
    }
}

async fn saved(model: &Model, cut: Cut, world: u64) -> (Store, Chain, TensorRef) {
    let store = Store::memory();
    let mut chain = running(&store, world as u32).await;
    let (checkpoint, _) = model.save(&mut chain, cut, world).await;
    (store, chain, checkpoint)
}

#[tokio::test(flavor = "multi_thread")]
async fn twenty_million_parameters_load_at_any_size_and_layout() {
    let model = Model::new(512);
    assert!(model.catalog.elements() > 20_000_000);
    for (cut, balance) in [(Cut::Flat, 1.15), (Cut::Grid(2), 1.05), (Cut::Replicated, 1.10)] {
        let store = Store::memory();
        let mut chain = running(&store, 4).await;
        let (checkpoint, written) = model.save(&mut chain, cut, 4).await;
        println!("saved {cut:?} at 4: max over mean bytes written {written:.4}");
        assert!(written < balance, "{cut:?}: {written}");
        let reader = Reader::open(&store, &job(), &checkpoint).await.unwrap();
        for (to, world) in
            [(Cut::Flat, 1), (Cut::Rows, 2), (Cut::Columns, 3), (Cut::Flat, 8), (Cut::Grid(4), 8), (Cut::Replicated, 3)]
        {
            let (ratio, read) = model.load(&reader, to, world).await;
            println!("  loaded {to:?} at {world}: read over needed {ratio:.4}, max over mean bytes read {read:.4}");
            assert_eq!(ratio, 1.0, "{to:?} at {world}: each byte once");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_layout_loads_as_every_other() {
    let model = Model::new(48);
    let cuts = [Cut::Flat, Cut::Rows, Cut::Columns, Cut::Grid(2), Cut::Replicated];
    for from in cuts {
        let (store, _, checkpoint) = saved(&model, from, 4).await;
        let reader = Reader::open(&store, &job(), &checkpoint).await.unwrap();
        for (to, world) in cuts.into_iter().flat_map(|to| [1, 2, 3, 8].map(|world| (to, world))) {
            if matches!(to, Cut::Grid(_)) && world % 2 == 1 {
                continue;
            }
            let (ratio, _) = model.load(&reader, to, world).await;
            assert_eq!(ratio, 1.0, "{from:?} to {to:?} at {world}: each byte once");
        }
        assert_eq!(verify_tensors(&store, &job(), &checkpoint).await.unwrap(), vec![]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lone_reader_of_rows_stays_under_the_bound_and_one_of_columns_says_what_it_costs() {
    let model = Model::new(512);
    let (store, _, checkpoint) = saved(&model, Cut::Rows, 4).await;
    let reader = Reader::open(&store, &job(), &checkpoint).await.unwrap();
    let alone = |cut, world, rank: usize| {
        let own = boxes(&model.catalog, cut, world).swap_remove(rank);
        LoadPlan::new(&reader, &[own], LoadOptions::default()).unwrap()
    };
    for (world, rank) in [(1, 0), (2, 1), (3, 1), (8, 5)] {
        let ratio = alone(Cut::Flat, world, rank).ratio();
        println!("flat shard {rank} of {world}, alone: {ratio:.4}");
        assert!(ratio <= 1.05, "{rank} of {world}: {ratio}");
    }
    let plan = alone(Cut::Columns, 2, 0);
    let ratio = plan.ratio();
    assert!((1.8..2.0).contains(&ratio), "a proof needs whole rows: {ratio}");
}

#[tokio::test]
async fn canonical_checkpoints_and_boxes_read_as_one_another() {
    let store = Store::memory();
    let mut chain = running(&store, 3).await;
    let space = medium();
    let canonical = save(&mut chain, &space, 50).await;
    let manifest = open_checkpoint(&store, &job(), &canonical).await.unwrap();
    // Every state as boxes, cut in columns and otherwise.
    let states = StateDecl::adamw().into_iter().map(|decl| CanonicalState { prefix: format!("{}/", decl.name), decl });
    let states: Vec<_> = states.collect();
    let mut tensors = vec![];
    let mut held: Vec<_> = (0..2).map(|r| Description { rank: Rank::new(r), pieces: vec![] }).collect();
    let mut data = [vec![], vec![]];
    for state in &states {
        let reader = Reader::of_canonical(&store, manifest.clone(), &state.decl.name).unwrap();
        let all = values(&space, tensors.len() / space.tensors().len(), 50);
        for (tensor, range) in space.tensor_ranges() {
            let whole = BoxPiece::new(tensor.name.clone(), &vec![0; tensor.shape.len()], &tensor.shape).unwrap();
            assert!(reader.read_box(&whole).await.unwrap() == all[4 * range.start as usize..4 * range.end as usize]);
            let name = format!("{}{}", state.prefix, tensor.name);
            tensors.push(TensorInfo::new(name.clone(), ElementType::F32, tensor.shape.clone()));
            let (last, columns) = (tensor.shape.len() - 1, *tensor.shape.last().unwrap());
            for (rank, cut) in [(0, 0..columns / 3), (1, columns / 3..columns)] {
                let (mut offsets, mut lengths) = (vec![0; last + 1], tensor.shape.clone());
                (offsets[last], lengths[last]) = (cut.start, cut.end - cut.start);
                let part = BoxPiece::new(tensor.name.clone(), &offsets, &lengths).unwrap();
                data[rank].push(Bytes::from(reader.read_box(&part).await.unwrap()));
                held[rank].pieces.push(BoxPiece { tensor: name.clone(), region: part.region });
            }
        }
    }
    let catalog = Catalog::new(tensors).unwrap();
    let plan = SavePlan::new(&catalog, &held).unwrap();
    let mut receipts = vec![];
    for (rank, data) in (0..).map(Rank::new).zip(data) {
        let source = TensorSource { job: job(), step: Step::new(50), generation: Generation::new(1), rank, data };
        receipts.push(upload_boxes(&store, &plan, &source, Uuid::new_v4()).await.unwrap());
    }
    let boxed = TensorManifest::assemble(&plan, receipts, BTreeMap::new()).unwrap();
    let reader = Reader::of_boxes(&store, boxed);
    let digest = canonicalize(&reader, &space, &scalar(50), &states).await.unwrap();
    assert_eq!(digest, canonical.digest);
    let other = canonicalize(&reader, &space, &scalar(51), &states).await.unwrap();
    assert_ne!(other, canonical.digest);
    let missing = CanonicalState { decl: StateDecl::f32("param"), prefix: "none/".into() };
    let error = canonicalize(&reader, &space, &scalar(50), &[missing]).await.unwrap_err();
    assert!(error.to_string().contains("none/model.layers.0.weight"), "{error}");
}

#[tokio::test]
async fn objects_are_safetensors_that_place_their_boxes() {
    let model = Model::new(16);
    let (store, _, checkpoint) = saved(&model, Cut::Grid(2), 4).await;
    let manifest = open_tensors(&store, &job(), &checkpoint).await.unwrap();
    for object in &manifest.objects {
        let bytes = store.get(&object.path, 1 << 30).await.unwrap();
        let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
        let words = header.metadata().clone().unwrap();
        let shapes: BTreeMap<String, Vec<u64>> = serde_json::from_str(&words["cairn.shapes"]).unwrap();
        let offsets: BTreeMap<String, Vec<u64>> = serde_json::from_str(&words["cairn.offsets"]).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(file.len(), object.pieces.len());
        for (name, view) in file.tensors() {
            let tensor = name.rsplit_once('#').unwrap().0;
            let info = &model.catalog.tensors()[model.catalog.find(tensor).unwrap()];
            assert_eq!(shapes[tensor], info.shape);
            let lengths: Vec<u64> = view.shape().iter().map(|&n| n as u64).collect();
            let piece = BoxPiece::new(tensor, &offsets[&name], &lengths).unwrap();
            assert_eq!(view.data(), model.bytes(&piece), "{name}");
        }
    }
}

#[tokio::test]
async fn a_flipped_byte_is_found_and_named() {
    let model = Model::new(16);
    let (store, _, checkpoint) = saved(&model, Cut::Flat, 3).await;
    let reader = Reader::open(&store, &job(), &checkpoint).await.unwrap();
    let manifest = open_tensors(&store, &job(), &checkpoint).await.unwrap();
    let object = &manifest.objects[1];
    let good = store.get(&object.path, 1 << 30).await.unwrap();
    for at in [3, 30, object.pieces[0].at as usize, good.len() / 2, good.len() - 1] {
        let mut bad = good.to_vec();
        bad[at] ^= 4;
        store.delete(&object.path).await.unwrap();
        store.create(&object.path, bad.into()).await.unwrap();
        let problems = verify_tensors(&store, &job(), &checkpoint).await.unwrap();
        assert!(problems.len() == 1 && problems[0].0 == object.path, "byte {at}: {problems:?}");
        let mut failed = 0;
        for info in model.catalog.tensors() {
            if let Err(e) = reader.read_box(&BoxPiece::whole(info).unwrap()).await {
                assert!(e.kind() == Kind::Corrupt && e.to_string().contains(&info.name), "{e}");
                failed += 1;
            }
        }
        assert_eq!(failed, usize::from(at as u64 >= object.pieces[0].at), "a load reads bodies only");
    }
    store.delete(&object.path).await.unwrap();
    let problems = verify_tensors(&store, &job(), &checkpoint).await.unwrap();
    assert!(problems[0].1.contains("is missing"), "{problems:?}");
}

#[tokio::test]
async fn hostile_manifests_of_boxes_are_refused() {
    let model = Model::new(16);
    let (store, _, checkpoint) = saved(&model, Cut::Rows, 2).await;
    let manifest = open_tensors(&store, &job(), &checkpoint).await.unwrap();
    let text = manifest.to_json().unwrap();
    assert_eq!(TensorManifest::parse("m", &text).unwrap(), manifest);
    for cut in (0..text.len()).step_by(97) {
        assert_eq!(TensorManifest::parse("m", &text[..cut]).unwrap_err().kind(), Kind::Corrupt);
    }
    // The first piece of the first object is a scalar; this one is rows of the embedding.
    let (huge, piece) = (u64::MAX, "/objects/0/pieces/1");
    let chunked = json!({"offsets": [0]});
    let changes: Vec<(String, Value)> = vec![
        ("/format".into(), json!(0)),
        ("/kind".into(), json!("canonical")),
        ("/job".into(), json!("../x")),
        ("/world_size".into(), json!(0)),
        ("/metadata".into(), json!({"a": "x".repeat(2 << 20)})),
        ("/tensors".into(), json!([])),
        ("/tensors/0/shape".into(), json!([huge, huge])),
        ("/tensors/0/shape".into(), json!([1u64 << 40, 16])),
        ("/tensors/0/shape".into(), json!(vec![1; 17])),
        ("/tensors/0/dtype".into(), json!("F99")),
        ("/tensors/0/dtype".into(), json!("F64")),
        ("/tensors/1/name".into(), json!("embed")),
        ("/objects".into(), json!([])),
        ("/objects/0/path".into(), json!("jobs/tiny/objects/../../etc/passwd")),
        ("/objects/0/path".into(), json!(manifest.objects[1].path)),
        ("/objects/0/bytes".into(), json!(huge)),
        ("/objects/0/bytes".into(), json!(100)),
        ("/objects/0/pieces".into(), json!([])),
        (format!("{piece}/tensor"), json!(1_000_000)),
        (format!("{piece}/tensor"), json!(1)),
        (format!("{piece}/region"), json!([[huge, 0], [1, 1]])),
        (format!("{piece}/region"), json!([[0, 0], [huge, huge]])),
        (format!("{piece}/region"), json!([[0, 0], [0, 1]])),
        (format!("{piece}/region"), json!([vec![0; 100_000], vec![1; 100_000]])),
        (format!("{piece}/region"), json!([[1, 0], [128, 16]])),
        (format!("{piece}/region"), chunked),
        (format!("{piece}/at"), json!(huge)),
        (format!("{piece}/at"), json!(0)),
        (format!("{piece}/chunk"), json!(0)),
        (format!("{piece}/chunk"), json!(huge)),
        (format!("{piece}/chunk"), json!(1)),
        (format!("{piece}/hashes"), json!("")),
        (format!("{piece}/hashes"), json!("0".repeat(64 * 1000))),
    ];
    for (place, value) in changes {
        let mut changed: Value = serde_json::from_slice(&text).unwrap();
        *changed.pointer_mut(&place).unwrap_or_else(|| panic!("{place}")) = value.clone();
        let error = TensorManifest::parse("the/manifest.json", &serde_json::to_vec(&changed).unwrap());
        let shown: String = value.to_string().chars().take(60).collect();
        let error = error.expect_err(&format!("{place} = {shown}"));
        assert_eq!(error.kind(), Kind::Corrupt, "{place}: {error}");
        let text = error.to_string();
        assert!(text.contains("the/manifest.json") && text.len() < 1000, "{place}: {text}");
    }
    let mut newer: Value = serde_json::from_slice(&text).unwrap();
    newer["format"] = json!(7);
    let error = TensorManifest::parse("m", &serde_json::to_vec(&newer).unwrap()).unwrap_err();
    assert!(matches!(error, StoreError::NewerFormat { found: 7, .. }), "{error}");
    // A box that two objects hold.
    let mut doubled: Value = serde_json::from_slice(&text).unwrap();
    let mut twin = doubled["objects"][0].clone();
    twin["path"] = json!("jobs/tiny/objects/00/other.safetensors");
    doubled["objects"].as_array_mut().unwrap().push(twin);
    let error = TensorManifest::parse("m", &serde_json::to_vec(&doubled).unwrap()).unwrap_err();
    assert!(error.to_string().contains("overlap in"), "{error}");
}

#[tokio::test]
async fn only_complete_receipts_of_one_plan_make_a_manifest() {
    let model = Model::new(16);
    let store = Store::memory();
    let held = model.described(Cut::Columns, 3);
    let plan = SavePlan::new(&model.catalog, &held).unwrap();
    let good = model.receipts(&store, &plan, &held).await;
    let assemble = |receipts: Vec<TensorReceipt>| TensorManifest::assemble(&plan, receipts, BTreeMap::new());
    let mut twice = good.clone();
    twice.push(good[1].clone());
    twice.reverse();
    assert_eq!(assemble(twice).unwrap(), assemble(good.clone()).unwrap());
    let change = |edit: &dyn Fn(&mut TensorReceipt)| {
        let mut changed = good.clone();
        edit(&mut changed[2]);
        changed
    };
    let other = PlanKey::of(&[]);
    let wrong = [
        vec![],
        good[..2].to_vec(),
        change(&|r| r.step = Step::new(10)),
        change(&|r| r.generation = Generation::new(2)),
        change(&|r| r.plan = other),
        change(&|r| r.object = None),
        change(&|r| drop(r.object.as_mut().unwrap().pieces.pop())),
        change(&|r| r.rank = Rank::new(3)),
        [good.clone(), change(&|r| r.object.as_mut().unwrap().bytes += 1)].concat(),
    ];
    for receipts in wrong {
        assert_eq!(assemble(receipts).unwrap_err().kind(), Kind::Input);
    }
}

#[tokio::test]
async fn the_chain_keeps_boxes_apart_and_collection_keeps_their_bytes() {
    let model = Model::new(16);
    let (store, mut chain, checkpoint) = saved(&model, Cut::Flat, 2).await;
    assert_eq!(chain.history().newest_good(), None, "no job resumes from boxes");
    chain.append(formed(2, 2, None)).await.unwrap();
    assert_eq!(sweep(&chain, &[].into()).await.unwrap(), 0);
    let read = Chain::load(&store, &job()).await.unwrap().unwrap();
    assert_eq!(read.history().tensor_checkpoints, vec![checkpoint.clone()]);
    let late = Record::new(EPOCH, Generation::new(2), Event::CommittedTensors(checkpoint.clone()));
    assert!(matches!(chain.append(late).await, Err(ChainError::Refused { .. })), "a commit of generation 1");
    let deleted = Event::Deleted { manifest: checkpoint.manifest.clone() };
    chain.append(Record::new(EPOCH, Generation::new(2), deleted)).await.unwrap();
    assert_eq!(chain.history().tensor_checkpoints, vec![]);
    assert_eq!(sweep(&chain, &[].into()).await.unwrap(), 3, "a manifest and two objects");
}

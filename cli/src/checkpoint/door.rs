//! The way to a store's leader: a coordinator that is asked, or this command itself, leading for its own length.
//!
//! While a coordinator is named, the request carries the token of the leader record this command reads in its store: a
//! coordinator of another store, or of the original of a copied one, refuses it.

use std::time::Duration;

use checkpoint_store::{
    Chain, Change, ChangeReport, Claim, Event, Keeper, Kind, LeadError, Leadership, Policy, Record, Store, leader,
    read_spec,
};
use proto::ids::JobName;
use proto::spec::JobSpec;
use proto::wire::CheckpointChange;
use tokio::time::{Instant, sleep};

use super::args::LeaderArgs;
use crate::args::{OperatorArgs, Output};
use crate::client::{self, Client};
use crate::failure::Failure;
use crate::parts::host_identity;

/// Sweeping a large store takes a while.
const LIMIT: Duration = Duration::from_secs(3600);
/// How long a coordinator that is away or busy is asked again.
const PATIENCE: Duration = Duration::from_secs(30);

/// A coordinator that performs changes of one job.
#[derive(Clone)]
pub(super) struct Door {
    client: Client,
    address: String,
    job: JobName,
    nonce: String,
}

impl Door {
    /// The named coordinator, if one is named.
    pub(super) async fn named(args: &LeaderArgs, store: &Store, job: &JobName) -> Result<Option<Self>, Failure> {
        let Some(coordinator) = args.coordinator.clone() else { return Ok(None) };
        let (token_file, security) = (args.token_file.clone(), args.security.clone());
        let operator = OperatorArgs { coordinator: coordinator.clone(), token_file, security, output: Output::Text };
        let client = client::operator(&operator).await?;
        let view = leader::observe(store).await?;
        let nonce = view.map(|view| view.leader.token).ok_or_else(|| {
            Failure::request(format!("the store {} never had a coordinator: leave --coordinator out", store.url()))
        })?;
        Ok(Some(Self { client, address: coordinator, job: job.clone(), nonce }))
    }

    /// Asks for a change until somebody hears it: changes are harmless to repeat.
    pub(super) async fn ask(&self, change: &Change) -> Result<ChangeReport, Failure> {
        let change = change.to_json()?;
        let begin = Instant::now();
        let reply = loop {
            let request =
                CheckpointChange { job: self.job.to_string(), nonce: self.nonce.clone(), change: change.clone() };
            let asked = self.client.clone().change_checkpoint(client::timed_for(request, LIMIT)).await;
            match asked {
                Err(status) if client::is_passing(&status) && begin.elapsed() < PATIENCE => {
                    sleep(Duration::from_millis(200)).await;
                }
                other => break other,
            }
        };
        let reply = reply.map_err(|status| client::explain(status, &self.address))?.into_inner();
        serde_json::from_slice(&reply.report)
            .map_err(|error| Failure::job(format!("the coordinator's answer cannot be read: {error}")))
    }
}

/// Performs a change: through the coordinator that is named, or with none by leading the store for as long as it takes.
pub(super) async fn perform(
    args: &LeaderArgs,
    store: &Store,
    chain: Chain,
    change: &Change,
) -> Result<ChangeReport, Failure> {
    if let Some(door) = Door::named(args, store, chain.job()).await? {
        return door.ask(change).await;
    }
    let claim = Claim { address: None, host: host_identity() };
    let leadership = Leadership::acquire(store, &claim, false).await.map_err(explain)?;
    let epoch = leadership.epoch();
    let work = async {
        let mut chain = chain;
        // Whatever was appended before this command led.
        chain.refresh().await?;
        let policy = policy(&chain).await?;
        let record = Event::Led { epoch, leader: format!("cairn checkpoint on {}", claim.host) };
        let generation = chain.history().generation;
        chain.append(Record::new(epoch, generation, record)).await.map_err(refused)?;
        let mut keeper = Keeper::default();
        let now = Instant::now();
        keeper.perform(&mut chain, epoch, now.elapsed(), &policy, change).await.map_err(refused)
    };
    leadership.during(work).await.map_err(explain)?
}

/// What the job itself keeps.
pub(super) async fn policy(chain: &Chain) -> Result<Policy, Failure> {
    let Some(hash) = chain.history().spec_hash else {
        return Err(Failure::request(format!("the chain of job {} names no specification", chain.job())));
    };
    let bytes = read_spec(chain.store(), chain.job(), hash).await?;
    let place = format!("job {}: its specification", chain.job());
    let spec: JobSpec = serde_json::from_slice(&bytes)
        .map_err(|error| Failure::new(crate::failure::BAD_DATA, format!("{place} cannot be read: {error}")))?;
    spec.validate(&place)?;
    Ok(Policy::from(&spec.checkpoint))
}

fn refused(error: checkpoint_store::ChainError) -> Failure {
    match error {
        checkpoint_store::ChainError::Store(error) => error.into(),
        error if error.kind() == Kind::Fenced => Failure::request(format!("{error}; try again")),
        error => Failure::job(error),
    }
}

fn explain(error: LeadError) -> Failure {
    match error {
        LeadError::Led { address: Some(ref address), .. } => Failure::request(format!(
            "{error}: let it do this, with --coordinator {address} (and its --token-file), or stop it first"
        )),
        LeadError::Led { .. } => Failure::request(format!("{error}: try again when it is done")),
        LeadError::Fenced(why) => Failure::job(format!("{why}; the command stopped half-way, and may be repeated")),
        LeadError::Store(error) => error.into(),
    }
}

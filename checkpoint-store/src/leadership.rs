//! Winning and holding the leadership of a store: what a coordinator does for its life, and a command for its length.
//!
//! The next epoch may be taken if there is no leader, if the last one stepped down, or if it is surely dead: its beats
//! stand still, or it ran on this host at the address this process now holds. A leader beats every second. That gives
//! liveness only; what keeps a deposed leader from harm is that it loses every append ([`crate::chain`]).

use std::sync::Arc;
use std::time::Duration;

use proto::ids::Epoch;
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};

use crate::backend::Store;
use crate::error::{Kind, StoreError};
use crate::leader::{self, LEADER_FORMAT, LeaderRecord, LeaderView, Take};

/// Between two beats.
const BEAT: Duration = Duration::from_secs(1);
/// A leader whose beats stand still this long is dead.
const STILL: Duration = Duration::from_secs(5);
/// So long after a beat, which is less than [`STILL`], a leader may be sure that nobody has taken its place.
const TERM: Duration = Duration::from_secs(4);
/// Between two looks at another leader's beats.
const LOOK: Duration = Duration::from_millis(500);
/// Beats between two checks that no higher epoch exists.
const CHECK_EVERY: u64 = 5;
/// A leader that cannot beat this long steps down: after [`STILL`] another one may have taken its place, and whoever
/// still listens to this one is missed there.
const MOST_SILENCE: Duration = Duration::from_secs(8);

/// Who wants to lead.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim {
    /// Where it listens, as `host:port`; `None` for a command.
    pub address: Option<String>,
    /// What tells this boot of this host from any other.
    pub host: String,
}

/// Why somebody does not lead.
#[derive(Debug, thiserror::Error)]
pub enum LeadError {
    /// Another one leads and is alive.
    #[error("the store {store} is led by {} on host {host} (epoch {epoch}), which is alive", who(address.as_deref()))]
    Led {
        /// The store.
        store: String,
        /// Where the leader listens; `None` for a command at work.
        address: Option<String>,
        /// Its host.
        host: String,
        /// Its epoch.
        epoch: Epoch,
    },
    /// The leadership is lost.
    #[error("{0}")]
    Fenced(String),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

fn who(address: Option<&str>) -> String {
    address.map_or_else(|| "a command at work".into(), |address| format!("the coordinator at {address}"))
}

/// A won epoch.
#[derive(Debug, Clone)]
pub struct Leadership {
    store: Store,
    epoch: Epoch,
    token: String,
    sure: Arc<watch::Sender<Instant>>,
}

impl Leadership {
    /// Takes the next epoch. While another leader is alive this is refused, or with `wait` put off until it is gone.
    pub async fn acquire(store: &Store, claim: &Claim, wait: bool) -> Result<Self, LeadError> {
        loop {
            let view = leader::observe(store).await?;
            let next = match &view {
                None => Epoch::ZERO.next(),
                Some(view) => {
                    if !is_free(view, claim) && !stands_still(store, view).await? {
                        if wait {
                            continue;
                        }
                        return Err(LeadError::Led {
                            store: store.url().to_string(),
                            address: view.leader.address.clone(),
                            host: view.leader.host.clone(),
                            epoch: view.epoch,
                        });
                    }
                    view.epoch.next()
                }
            };
            let Some(epoch) = next else {
                return Err(StoreError::Corrupt("the leader epochs are used up".into()).into());
            };
            let token = store.token();
            let record = LeaderRecord {
                format: LEADER_FORMAT,
                epoch,
                address: claim.address.clone(),
                host: claim.host.clone(),
                token: token.clone(),
            };
            match leader::take(store, epoch, &record).await? {
                Take::Won => {
                    let sure = Arc::new(watch::Sender::new(Instant::now() + TERM));
                    return Ok(Self { store: store.clone(), epoch, token, sure });
                }
                Take::Lost => sleep(LOOK).await,
            }
        }
    }

    /// The epoch.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// The token in the leader record, by which others can tell that they see the same store.
    pub fn token(&self) -> &str {
        &self.token
    }

    /// Until when this leader may be sure that it still is one, which each beat puts off. A leader that was asleep, or
    /// is cut off from the store, does well to say nothing until it is sure again: it may have been replaced.
    pub fn sure_until(&self) -> watch::Receiver<Instant> {
        self.sure.subscribe()
    }

    /// Beats until the leadership is lost, and says how; gives it back when `stop` completes.
    pub async fn hold(self, stop: impl Future<Output = ()>) -> Result<(), LeadError> {
        let mut ticks = interval(BEAT);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut number, mut beaten) = (0_u64, Instant::now());
        tokio::pin!(stop);
        loop {
            tokio::select! {
                biased;
                _ = ticks.tick() => {}
                () = &mut stop => {
                    leader::release(&self.store, self.epoch, number + 1).await?;
                    return Ok(());
                }
            }
            number += 1;
            // One that was asleep looks first whether it was replaced; even then it is given the time to do so.
            let (began, silence) = (Instant::now(), beaten.elapsed());
            let look = silence >= TERM || number.is_multiple_of(CHECK_EVERY);
            let patience = MOST_SILENCE.saturating_sub(silence).max(2 * BEAT);
            let error = match timeout(patience, self.beat(number, look)).await {
                Ok(Ok(())) => {
                    beaten = began;
                    self.sure.send_replace(began + TERM);
                    continue;
                }
                Ok(Err(error)) if error.kind() == Kind::Fenced => return Err(LeadError::Fenced(error.to_string())),
                Ok(Err(error)) => error.to_string(),
                Err(_) => "the store did not answer".to_string(),
            };
            if beaten.elapsed() >= MOST_SILENCE {
                let seconds = beaten.elapsed().as_secs();
                return Err(LeadError::Fenced(format!("no beat was stored for {seconds} s: {error}")));
            }
            tracing::warn!("a beat was not stored: {error}");
        }
    }

    /// Leads for the length of some work. If the leadership is lost the work is dropped half-way, as by a crash.
    pub async fn during<T>(self, work: impl Future<Output = T>) -> Result<T, LeadError> {
        let (done, ended) = tokio::sync::oneshot::channel::<()>();
        let mut holding = Box::pin(self.hold(async {
            // A dropped sender means the same.
            let _ = ended.await;
        }));
        let outcome = tokio::select! {
            biased;
            held = &mut holding => {
                held?;
                return Err(LeadError::Fenced("the leadership ended early".into()));
            }
            outcome = work => outcome,
        };
        drop(done);
        if let Err(error) = holding.await {
            // The work is done; a successor only waits longer.
            tracing::warn!("the leadership was not given back: {error}");
        }
        Ok(outcome)
    }

    /// Writes a beat; if it is to `look`, only when no higher epoch is found.
    async fn beat(&self, number: u64, look: bool) -> Result<(), StoreError> {
        if look
            && let Some(next) = self.epoch.next()
            && let Some(other) = leader::read(&self.store, next).await?
        {
            let (who, host) = (who(other.address.as_deref()), other.host);
            return Err(StoreError::Fenced(format!("epoch {next} was taken by {who} on host {host}")));
        }
        leader::beat(&self.store, self.epoch, number).await
    }
}

/// Whether the last leader is surely gone.
fn is_free(view: &LeaderView, claim: &Claim) -> bool {
    // Two processes cannot listen at one address of one boot of one host, and this one does.
    let same = claim.address.is_some() && view.leader.address == claim.address && view.leader.host == claim.host;
    view.released || same
}

/// Watches another leader's beats; `false` as soon as one moves.
async fn stands_still(store: &Store, before: &LeaderView) -> Result<bool, StoreError> {
    tracing::info!(epoch = before.epoch.get(), leader = ?before.leader.address, "watching whether the leader is alive");
    let begin = Instant::now();
    while begin.elapsed() < STILL {
        sleep(LOOK).await;
        match leader::observe(store).await? {
            Some(now) if now.released => return Ok(true),
            Some(now) if (now.epoch, now.newest_beat) != (before.epoch, before.newest_beat) => return Ok(false),
            _ => {}
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claim(address: Option<&str>, host: &str) -> Claim {
        Claim { address: address.map(Into::into), host: host.into() }
    }

    #[tokio::test]
    async fn a_living_leader_is_respected_and_a_dead_one_replaced() {
        let store = Store::memory();
        let one = claim(Some("127.0.0.1:1"), "host/boot");
        let first = Leadership::acquire(&store, &one, false).await.unwrap();
        assert_eq!(first.epoch().get(), 1);
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let holding = tokio::spawn(first.hold(async {
            let _ = stopped.await;
        }));
        for other in [claim(Some("127.0.0.1:2"), "host/boot"), claim(None, "host/boot")] {
            let refused = Leadership::acquire(&store, &other, false).await.unwrap_err();
            assert!(matches!(&refused, LeadError::Led { address, .. } if *address == one.address), "{refused}");
        }
        // The same address of the same boot is held by the caller, so the former holder is dead.
        let second = Leadership::acquire(&store, &one, false).await.unwrap();
        assert_eq!(second.epoch().get(), 2);
        stop.send(()).unwrap();
        holding.await.unwrap().unwrap();
        second.hold(async {}).await.unwrap();
        let third = Leadership::acquire(&store, &claim(Some("127.0.0.1:3"), "other"), false).await.unwrap();
        assert_eq!(third.epoch().get(), 3);
    }

    #[tokio::test]
    async fn a_command_leads_for_its_length_and_no_longer() {
        let store = Store::memory();
        let command = claim(None, "host/boot");
        for epoch in 1..4 {
            let leadership = Leadership::acquire(&store, &command, false).await.unwrap();
            let worked = leadership.during(async { epoch }).await.unwrap();
            let view = leader::observe(&store).await.unwrap().unwrap();
            assert_eq!((worked, view.epoch.get(), view.released), (epoch, epoch, true));
        }
        let leadership = Leadership::acquire(&store, &command, false).await.unwrap();
        let record = |epoch| LeaderRecord {
            format: LEADER_FORMAT,
            epoch,
            address: None,
            host: "other".into(),
            token: store.token(),
        };
        let next = leadership.epoch().next().unwrap();
        assert_eq!(leader::take(&store, next, &record(next)).await.unwrap(), Take::Won);
        let lost = leadership.during(std::future::pending::<()>()).await.unwrap_err();
        assert!(matches!(&lost, LeadError::Fenced(why) if why.contains("epoch 5")), "{lost}");
    }
}

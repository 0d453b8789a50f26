//! The agents that NIXL knows, and how many connections name each.

use std::collections::{BTreeMap, VecDeque};

use super::metadata::check_metadata;

/// Agents that NIXL goes on knowing after their last connection was given up: as many as there may be peers by default
/// (`pd_max_peers`), so that all of them can be lost at once.
const RETIRED_MAX: usize = 1024;

/// An agent whose metadata NIXL has loaded.
#[derive(Debug)]
struct NamedAgent {
    /// What NIXL was told of it.
    metadata: Vec<u8>,
    /// A request to it has failed: the way to it is not to be used again.
    broken: bool,
    /// How many connections name it, those among them that are leaving.
    connections: usize,
}

/// What an agent's metadata says beside what NIXL was told of it before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum News {
    /// Nothing: it says the same, or is older.
    Nothing,
    /// More of its memory.
    Grown,
}

/// What NIXL has to do before one more connection can name an agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// Nothing: it knows the agent, by this metadata or by later metadata.
    Known,
    /// To load what has been added.
    Grown,
    /// To load it: it does not know the agent.
    New,
    /// To forget the agent and to load it, since the way to it has broken or its metadata says something else.
    Anew,
}

/// All of them. NIXL knows an agent as long as it is in here; those that no connection names are retired.
#[derive(Debug, Default)]
pub(super) struct Agents {
    known: BTreeMap<String, NamedAgent>,
    /// Names of the retired, the latest last.
    retired: VecDeque<String>,
}

impl Agents {
    /// How one more connection comes to an agent that says `metadata`.
    pub(super) fn way_to(&self, agent_name: &str, metadata: &[u8]) -> Way {
        let Some(agent) = self.known.get(agent_name) else { return Way::New };
        match self.news(agent_name, metadata) {
            _ if agent.broken => Way::Anew,
            Ok(News::Grown) => Way::Grown,
            // Late metadata takes nothing from those who use what came after it.
            Ok(News::Nothing) if agent.connections > 0 || metadata == agent.metadata => Way::Known,
            Ok(News::Nothing) | Err(_) => Way::Anew,
        }
    }

    /// What `metadata` adds for an agent that NIXL knows, or why it is not to be told of it.
    pub(super) fn news(&self, agent_name: &str, metadata: &[u8]) -> Result<News, String> {
        let after = check_metadata(metadata)?;
        let before = check_metadata(self.metadata(agent_name))?;
        if before.check_grown_from(&after).is_ok() {
            return Ok(News::Nothing);
        }
        after.check_grown_from(&before).map(|()| News::Grown)
    }

    /// What NIXL was told of an agent; empty where it does not know it.
    pub(super) fn metadata(&self, agent_name: &str) -> &[u8] {
        self.known.get(agent_name).map_or(&[], |agent| &agent.metadata)
    }

    /// NIXL has loaded an agent that it did not know, or had forgotten.
    pub(super) fn loaded(&mut self, agent_name: &str, metadata: &[u8]) {
        let connections = self.known.get(agent_name).map_or(0, |agent| agent.connections);
        let agent = NamedAgent { metadata: metadata.to_vec(), broken: false, connections };
        self.known.insert(agent_name.to_owned(), agent);
    }

    /// NIXL has loaded more of an agent that it knew.
    pub(super) fn grown(&mut self, agent_name: &str, metadata: &[u8]) {
        if let Some(agent) = self.known.get_mut(agent_name) {
            agent.metadata = metadata.to_vec();
        }
    }

    /// A request to an agent has failed: the next connection makes another way to it.
    pub(super) fn broke(&mut self, agent_name: &str) {
        if let Some(agent) = self.known.get_mut(agent_name) {
            agent.broken = true;
        }
    }

    /// NIXL does not know an agent any more. While connections still name it, that is a broken way for them.
    pub(super) fn forgotten(&mut self, agent_name: &str) {
        match self.known.get_mut(agent_name) {
            Some(agent) if agent.connections > 0 => agent.broken = true,
            _ => {
                self.known.remove(agent_name);
                self.retired.retain(|retired| retired != agent_name);
            }
        }
    }

    /// A connection names an agent that is known.
    pub(super) fn named(&mut self, agent_name: &str) {
        if let Some(agent) = self.known.get_mut(agent_name) {
            agent.connections += 1;
            self.retired.retain(|retired| retired != agent_name);
        }
    }

    /// A connection does not name it any more. The agent that NIXL is to forget now, if there is one: this one when it was
    /// the last connection and the way has broken, or the one that was retired first when they have become too many.
    pub(super) fn released(&mut self, agent_name: &str) -> Option<String> {
        let agent = self.known.get_mut(agent_name)?;
        agent.connections = agent.connections.saturating_sub(1);
        if agent.connections > 0 {
            return None;
        }
        let unwanted = if agent.broken {
            Some(agent_name.to_owned())
        } else {
            self.retired.push_back(agent_name.to_owned());
            if self.retired.len() > RETIRED_MAX { self.retired.pop_front() } else { None }
        };
        if let Some(unwanted) = &unwanted {
            self.known.remove(unwanted);
        }
        unwanted
    }
}

#[cfg(test)]
mod tests {
    use super::super::metadata::sample_metadata;
    use super::*;

    const NAME: &str = "receiver-1";

    fn said(ranges: &[u8]) -> Vec<u8> {
        sample_metadata(b"an address of UCX", ranges)
    }

    fn named_by(connections: usize) -> Agents {
        let mut agents = Agents::default();
        agents.loaded(NAME, &said(&[1, 2]));
        (0..connections).for_each(|_| agents.named(NAME));
        agents
    }

    #[test]
    fn an_agent_is_kept_while_a_connection_names_it() {
        // Broken in production: a node that forgets a peer as a writer can no longer write to it.
        let mut agents = named_by(2);
        agents.broke(NAME);
        assert_eq!(agents.released(NAME), None);
        assert_eq!(agents.released(NAME).as_deref(), Some(NAME));
        assert_eq!(agents.way_to(NAME, &said(&[1, 2])), Way::New);
        let mut agents = named_by(2);
        assert_eq!((agents.released(NAME), agents.released(NAME)), (None, None));
        assert_eq!(agents.way_to(NAME, &said(&[1, 2])), Way::Known, "its way is sound");
    }

    #[test]
    fn the_way_to_an_agent_is_what_its_metadata_and_its_failures_say() {
        // Broken in production: late metadata, or a failure that one half of a node has seen, ends the other half's
        // requests; or a broken way is used again.
        let another = sample_metadata(b"another address", &[1, 2]);
        for (connections, older) in [(0, Way::Anew), (1, Way::Known), (2, Way::Known)] {
            let mut agents = named_by(connections);
            assert_eq!(agents.way_to("receiver-2", &said(&[1])), Way::New);
            assert_eq!(agents.way_to(NAME, &said(&[1, 2])), Way::Known);
            assert_eq!(agents.way_to(NAME, &said(&[1, 2, 9])), Way::Grown);
            assert_eq!(agents.way_to(NAME, &said(&[2])), older);
            assert_eq!(agents.way_to(NAME, &said(&[2, 9])), Way::Anew);
            assert_eq!(agents.way_to(NAME, &another), Way::Anew);
            agents.grown(NAME, &said(&[1, 2, 9]));
            assert_eq!(agents.way_to(NAME, &said(&[1, 2, 9])), Way::Known);
            agents.broke(NAME);
            assert_eq!(agents.way_to(NAME, &said(&[1, 2, 9])), Way::Anew);
            agents.grown(NAME, &said(&[1, 2, 8, 9]));
            assert_eq!(agents.way_to(NAME, &said(&[1, 2, 8, 9])), Way::Anew, "more memory mends no way");
            agents.loaded(NAME, &said(&[1, 2]));
            assert_eq!(agents.way_to(NAME, &said(&[1, 2])), Way::Known);
            agents.forgotten(NAME);
            let without = if connections == 0 { Way::New } else { Way::Anew };
            assert_eq!(agents.way_to(NAME, &said(&[1, 2])), without);
        }
    }

    #[test]
    fn the_agent_that_was_retired_first_makes_room_and_one_that_is_named_does_not() {
        // Broken in production: a daemon whose peers come and go for weeks keeps all of them, or forgets one under a
        // connection.
        let mut agents = Agents::default();
        let names: Vec<String> = (0..RETIRED_MAX + 2).map(|number| format!("agent-{number}")).collect();
        for name in &names {
            agents.loaded(name, &said(&[1]));
            agents.named(name);
        }
        let unwanted: Vec<_> = names[..RETIRED_MAX].iter().filter_map(|name| agents.released(name)).collect();
        assert!(unwanted.is_empty(), "{unwanted:?}");
        agents.named(&names[0]);
        assert_eq!(agents.released(&names[RETIRED_MAX]), None, "there is room for one");
        assert_eq!(agents.released(&names[RETIRED_MAX + 1]).as_ref(), Some(&names[1]));
        assert_eq!(agents.way_to(&names[0], &said(&[1])), Way::Known);
    }
}

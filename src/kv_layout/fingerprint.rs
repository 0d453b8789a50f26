//! What two daemons must agree on before any byte moves, as the handshake carries it.

use super::KvLayout;

impl KvLayout {
    /// The fields that the handshake compares, by name. What explains a difference best comes first. The fields of a
    /// group carry its name where there are several: `sliding.layers`.
    pub fn fingerprint(&self) -> Vec<(String, String)> {
        // The size decides how many heads a rank has, and so most of what follows.
        let mut fields =
            vec![("model".to_owned(), self.model.clone()), ("tp_size".to_owned(), self.tp_size.to_string())];
        if self.groups.len() > 1 {
            let names: Vec<&str> = self.groups.iter().map(|group| group.name.as_str()).collect();
            fields.push(("groups".to_owned(), names.join(",")));
        }
        for group in &self.groups {
            let prefix = if self.groups.len() > 1 { format!("{}.", group.name) } else { String::new() };
            fields.extend(group.fingerprint().into_iter().map(|(name, value)| (format!("{prefix}{name}"), value)));
        }
        let whole = [
            ("chunk_tokens", self.chunk_tokens.to_string()),
            ("tp_rank", self.tp_rank.to_string()),
            ("chunk_bytes", self.chunk_bytes().to_string()),
        ];
        fields.extend(whole.map(|(name, value)| (name.to_owned(), value)));
        // Their own prefix: no fact can pass for a field of ours.
        fields.extend(self.engine.iter().map(|(name, value)| (format!("engine.{name}"), value.clone())));
        fields
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::llama3_8b;
    use super::*;

    /// The first field that the handshake would name: one that only one of them has differs too.
    fn first_difference(ours: &KvLayout, theirs: &KvLayout) -> Option<String> {
        let (ours, theirs) = (ours.fingerprint(), theirs.fingerprint());
        let differs = |field: &&(String, String)| !(ours.contains(field) && theirs.contains(field));
        theirs.iter().chain(&ours).find(differs).map(|(name, _)| name.clone())
    }

    #[test]
    fn every_field_of_a_layout_is_compared() {
        // Broken in production: peers with different layouts move bytes that mean something else at the other end.
        let mut ours = llama3_8b();
        ours.engine.insert("version".to_owned(), "1".to_owned());
        for (change, field) in [
            ((|l| l.model = "other".to_owned()) as fn(&mut KvLayout), "model"),
            (|l| l.groups[0].dtype = "float16".to_owned(), "dtype"),
            (|l| l.groups[0].layers = 33, "layers"),
            (|l| l.groups[0].kv_heads = 4, "kv_heads"),
            (|l| l.groups[0].head_size = 64, "head_size"),
            (|l| l.groups[0].kv_planes = 1, "planes"),
            (|l| l.groups[0].whole = true, "chunks"),
            (|l| l.chunk_tokens = 128, "chunk_tokens"),
            (|l| l.tp_rank = 1, "tp_rank"),
            (|l| l.tp_size = 2, "tp_size"),
            (|l| l.groups[0].dtype_bytes = 4, "chunk_bytes"),
            (|l| drop(l.engine.insert("version".to_owned(), "2".to_owned())), "engine.version"),
        ] {
            let mut theirs = ours.clone();
            change(&mut theirs);
            assert_eq!(first_difference(&ours, &theirs).as_deref(), Some(field));
        }
    }

    #[test]
    fn another_tensor_parallel_size_is_named_before_what_follows_from_it() {
        // Broken in production: an operator is told of other heads, and looks for another model.
        let mut theirs = llama3_8b();
        theirs.tp_size = 2;
        theirs.groups[0].kv_heads /= 2;
        assert_eq!(first_difference(&llama3_8b(), &theirs).as_deref(), Some("tp_size"));
    }
}

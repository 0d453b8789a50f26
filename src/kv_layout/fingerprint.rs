//! What two daemons must agree on before any byte moves, as the handshake carries it.

use std::fmt;

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
            fields.extend(group.fingerprint().map(|(name, value)| (format!("{prefix}{name}"), value)));
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

/// The first field in which two fingerprints differ. Displays as the reason of a refusal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldDifference {
    /// Which field.
    pub field: String,
    /// Its value here; none where we have no such field.
    pub ours: Option<String>,
    /// Its value at the peer; none where the peer has no such field.
    pub theirs: Option<String>,
}

impl fmt::Display for FieldDifference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let value = |value: &Option<String>| value.clone().unwrap_or_else(|| "not given".to_owned());
        write!(
            f,
            "the layouts differ in {}: {} here, {} at the peer; start both with the same model, chunk_size, rank and tp-size",
            self.field,
            value(&self.ours),
            value(&self.theirs)
        )
    }
}

/// Compares two fingerprints by field name, whatever their order. A field that only one of them has is a
/// difference: what a newer version compares must not be skipped by an older one.
pub fn first_difference(ours: &[(String, String)], theirs: &[(String, String)]) -> Option<FieldDifference> {
    fn find<'a>(fields: &'a [(String, String)], name: &str) -> Option<&'a String> {
        fields.iter().find(|(field, _)| field == name).map(|(_, value)| value)
    }
    for (field, our_value) in ours {
        let their_value = find(theirs, field);
        if their_value != Some(our_value) {
            return Some(FieldDifference {
                field: field.clone(),
                ours: Some(our_value.clone()),
                theirs: their_value.cloned(),
            });
        }
    }
    theirs.iter().find(|(field, _)| find(ours, field).is_none()).map(|(field, value)| FieldDifference {
        field: field.clone(),
        ours: None,
        theirs: Some(value.clone()),
    })
}

#[cfg(test)]
mod tests {
    use super::super::tests::llama3_8b;
    use super::*;

    #[test]
    fn equal_layouts_agree_in_any_order() {
        // Broken in production: peers of equal layout refuse each other.
        let ours = llama3_8b().fingerprint();
        let mut theirs = ours.clone();
        theirs.reverse();
        assert_eq!(first_difference(&ours, &theirs), None);
        assert_eq!(first_difference(&[], &[]), None);
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
            (|l| l.chunk_tokens = 128, "chunk_tokens"),
            (|l| l.tp_rank = 1, "tp_rank"),
            (|l| l.tp_size = 2, "tp_size"),
            (|l| l.groups[0].dtype_bytes = 4, "chunk_bytes"),
            (|l| drop(l.engine.insert("version".to_owned(), "2".to_owned())), "engine.version"),
        ] {
            let mut theirs = ours.clone();
            change(&mut theirs);
            let difference = first_difference(&ours.fingerprint(), &theirs.fingerprint()).unwrap();
            assert_eq!(difference.field, field);
        }
    }

    #[test]
    fn another_tensor_parallel_size_is_named_before_what_follows_from_it() {
        // Broken in production: an operator is told of other heads, and looks for another model.
        let mut theirs = llama3_8b();
        theirs.tp_size = 2;
        theirs.groups[0].kv_heads /= 2;
        let difference = first_difference(&llama3_8b().fingerprint(), &theirs.fingerprint()).unwrap();
        assert_eq!((difference.field.as_str(), difference.theirs.as_deref()), ("tp_size", Some("2")));
    }

    #[test]
    fn a_difference_names_the_field_and_both_values() {
        // Broken in production: an operator is told "layout mismatch" and has to guess which.
        let ours = llama3_8b();
        let mut theirs = llama3_8b();
        theirs.groups[0].layers = 80;
        let difference = first_difference(&ours.fingerprint(), &theirs.fingerprint()).unwrap();
        assert_eq!(
            difference.to_string(),
            "the layouts differ in layers: 32 here, 80 at the peer; start both with the same model, chunk_size, rank and tp-size"
        );
    }

    #[test]
    fn a_field_that_one_side_lacks_is_a_difference() {
        // Broken in production: a peer that leaves its fingerprint empty is taken for one that agrees.
        let ours = llama3_8b().fingerprint();
        let missing = first_difference(&ours, &[]).unwrap();
        assert_eq!((missing.field.as_str(), missing.theirs), ("model", None));
        let mut newer = ours.clone();
        newer.push(("engine_version".to_owned(), "7".to_owned()));
        let extra = first_difference(&ours, &newer).unwrap();
        assert_eq!((extra.field.as_str(), extra.ours), ("engine_version", None));
    }
}

//! The fixture's template against the text it must give, and the idioms and faults of others.

use serde_json::json;

use super::*;

fn fixture_file(name: &str) -> Vec<u8> {
    std::fs::read(format!("{}/fixture/{name}", env!("CARGO_MANIFEST_DIR"))).unwrap()
}

fn template(jinja: &str) -> ChatTemplate {
    ChatTemplate::from_files(Some(jinja.as_bytes()), None).unwrap()
}

fn configured(config: serde_json::Value) -> Result<ChatTemplate, ChatError> {
    ChatTemplate::from_files(None, Some(config.to_string().as_bytes()))
}

#[track_caller]
fn check(jinja: &str, messages: &[Message], expected: &str) {
    assert_eq!(template(jinja).render(messages, true).unwrap(), expected);
}

fn refused(template: &ChatTemplate) -> String {
    template.render(&[Message::user("Hi")], true).unwrap_err().to_string()
}

#[test]
fn the_fixtures_template_is_chatml() {
    let jinja = fixture_file("chat_template.jinja");
    let config = fixture_file("tokenizer_config.json");
    let template = ChatTemplate::from_files(Some(&jinja), Some(&config)).unwrap();
    let mut messages = vec![Message::user("What is the capital of France?")];
    assert_eq!(
        template.render(&messages, true).unwrap(),
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    );
    messages.insert(0, Message::new("system", " Be brief. "));
    messages.push(Message::new("assistant", "Paris & <more> 'text'\n"));
    assert_eq!(
        template.render(&messages, false).unwrap(),
        "<|im_start|>system\n Be brief. <|im_end|>\n\
         <|im_start|>user\nWhat is the capital of France?<|im_end|>\n\
         <|im_start|>assistant\nParis & <more> 'text'\n<|im_end|>\n"
    );
}

#[test]
fn the_template_may_be_in_the_tokenizer_config() {
    let one = configured(json!({"chat_template": "{{ bos_token }}[{{ messages[0].content }}]{{ eos_token }}",
        "bos_token": {"content": "<s>", "lstrip": false}, "eos_token": "</s>"}));
    assert_eq!(one.unwrap().render(&[Message::user("Hi")], true).unwrap(), "<s>[Hi]</s>");

    let named = |names: &[&str]| {
        let list: Vec<_> = names.iter().map(|name| json!({"name": name, "template": name})).collect();
        configured(json!({"chat_template": list}))
    };
    let rendered = |template: ChatTemplate| template.render(&[Message::user("Hi")], true).unwrap();
    assert_eq!(rendered(named(&["tool_use", "default"]).unwrap()), "default");
    assert_eq!(rendered(named(&["chat"]).unwrap()), "chat");
    let error = named(&["rag", "tool_use"]).err().unwrap();
    assert!(error.to_string().contains("rag, tool_use"), "{error}");
}

#[test]
fn a_file_of_its_own_wins() {
    let config = json!({"chat_template": "old", "bos_token": "<s>"}).to_string();
    let template = ChatTemplate::from_files(Some(b"new{{ bos_token }}"), Some(config.as_bytes())).unwrap();
    assert_eq!(template.render(&[Message::user("Hi")], true).unwrap(), "new<s>");
}

#[test]
fn blocks_are_trimmed_as_transformers_trims_them() {
    let jinja = "{% for message in messages %}\n    {% if loop.first %}\n<{{ message.role }}>\n    {% endif %}\n\
                 {{ message.content }}\n{% endfor %}\n{% if add_generation_prompt %}\n=\n{% endif %}\n";
    check(jinja, &[Message::user("a"), Message::user("b")], "<user>\na\nb\n=\n");
}

#[test]
fn python_idioms_of_real_templates_work() {
    // The forms Mixtral's, Qwen's and OLMoE's templates are made of.
    let jinja = "{%- if messages[0]['role'] == 'system' %}{% set system = messages[0].content.strip() %}\
        {% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif -%}\
        {%- set ns = namespace(count=0) -%}\
        {%- for m in rest %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}\
        {{ raise_exception('roles must alternate') }}{% endif %}\
        {%- set ns.count = ns.count + 1 %}{{ '[' ~ m.get('role').upper() ~ ':' + m.content.split('|')[-1]\
        + ']' }}{% endfor -%}\
        {{ ns.count }}{% if system is defined %}{{ system }}{% endif %}{% if tools is none %}!{% endif %}\
        {%- if strftime_now is defined %}{{ strftime_now('%d') }}{% endif %}";
    let messages = [Message::new("system", " S "), Message::user("x|y"), Message::new("assistant", "z")];
    check(jinja, &messages, "[USER:y][ASSISTANT:z]2S!");

    let error = template(jinja).render(&messages[2..], true).unwrap_err();
    assert!(matches!(&error, ChatError::Refused(message) if message == "roles must alternate"), "{error}");
    assert!(error.is_callers_fault());
}

#[test]
fn a_refusal_inside_a_macro_is_still_the_templates() {
    let error = template("{% macro f() %}{{ raise_exception('no ' ~ 'tools') }}{% endmacro %}{{ f() }}")
        .render(&[Message::user("Hi")], true)
        .unwrap_err();
    assert!(matches!(&error, ChatError::Refused(message) if message == "no tools"), "{error}");
}

#[test]
fn json_is_pythons() {
    let messages = [Message::user("<a> & 'é' \"q\"\n")];
    check("{{ messages[0].content | tojson }}", &messages, r#""<a> & 'é' \"q\"\n""#);
    check("{{ [1, true, none, 'x', {'k': []}] | tojson }}", &messages, r#"[1, true, null, "x", {"k": []}]"#);
}

#[test]
fn a_base_model_loads_and_says_what_to_do() {
    let template = configured(json!({"eos_token": "</s>"})).unwrap();
    assert!(!template.is_present());
    assert!(matches!(template.render(&[Message::user("Hi")], true), Err(ChatError::NoTemplate)));
    assert!(refused(&template).contains("chat_template.jinja"));
}

#[test]
fn no_messages_is_the_callers_fault() {
    let error = template("x").render(&[], true).unwrap_err();
    assert!(matches!(error, ChatError::NoMessages) && error.is_callers_fault());
}

#[test]
fn broken_files_are_refused_by_name() {
    let error = |jinja, config| ChatTemplate::from_files(jinja, config).err().unwrap().to_string();
    assert!(error(Some(b"{% if %}"), None).starts_with("chat_template.jinja cannot be read"));
    assert!(error(Some(b"\xff"), None).starts_with("chat_template.jinja cannot be read"));
    assert!(error(None, Some(b"{")).starts_with("tokenizer_config.json cannot be read"));
    let config = json!({"chat_template": "{{"}).to_string();
    assert!(error(None, Some(config.as_bytes())).starts_with("tokenizer_config.json cannot be read"));
}

#[test]
fn a_template_that_fails_says_where() {
    let error = template("\n\n{{ unheard_of() }}").render(&[Message::user("Hi")], true).unwrap_err();
    assert!(error.to_string().contains("chat_template:3"), "{error}");
    assert!(!error.is_callers_fault());
}

#[test]
fn a_hostile_template_runs_out_of_fuel() {
    let endless = "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}x\
                   {% endfor %}{% endfor %}{% endfor %}";
    assert!(refused(&template(endless)).contains("fuel"));
    let deep = "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}";
    assert!(refused(&template(deep)).contains("fails"));
    let grown = |step: &str, times| {
        let jinja = "{% set ns = namespace(x=[]) %}{% for i in range(TIMES) %}{% set ns.x = STEP %}{% endfor %}\
                     {{ ns.x | tojson }}";
        refused(&template(&jinja.replace("TIMES", times).replace("STEP", step)))
    };
    assert!(grown("[ns.x]", "1000").contains("nested too deeply"));
    assert!(grown("[ns.x, ns.x]", "40").contains("fuel"));
}

package wire

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestMergeMetadata(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name                         string
		current, change              string
		replaced, merged, deeplyDone string
	}{
		{"nothing there", ``, `{"a":1}`, `{"a":1}`, `{"a":1}`, `{"a":1}`},
		{"null there", `null`, `{"a":1}`, `{"a":1}`, `{"a":1}`, `{"a":1}`},
		{"key by key", `{"a":1,"b":2}`, `{"b":3,"c":4}`, `{"b":3,"c":4}`, `{"a":1,"b":3,"c":4}`, `{"a":1,"b":3,"c":4}`},
		{"nested", `{"o":{"x":1,"p":{"y":1}}}`, `{"o":{"p":{"z":2}}}`,
			`{"o":{"p":{"z":2}}}`, `{"o":{"p":{"z":2}}}`, `{"o":{"x":1,"p":{"y":1,"z":2}}}`},
		{"arrays are replaced", `{"a":[{"x":1},2]}`, `{"a":[{"y":2}]}`, `{"a":[{"y":2}]}`, `{"a":[{"y":2}]}`, `{"a":[{"y":2}]}`},
		{"null is a value", `{"a":{"x":1},"b":1}`, `{"a":null}`, `{"a":null}`, `{"a":null,"b":1}`, `{"a":null,"b":1}`},
		{"object over null", `{"a":null}`, `{"a":{"x":1}}`, `{"a":{"x":1}}`, `{"a":{"x":1}}`, `{"a":{"x":1}}`},
		{"change is null", `{"a":1}`, `null`, `null`, `null`, `null`},
		{"change is an array", `{"a":1}`, ` [1] `, `[1]`, `[1]`, `[1]`},
		{"current is an array", `[1]`, `{"a":1}`, `{"a":1}`, `{"a":1}`, `{"a":1}`},
		{"digits stay", `{"a":12345678901234567890.10,"o":{"b":1e400}}`, `{"c":1.0,"o":{}}`,
			`{"c":1.0,"o":{}}`, `{"a":12345678901234567890.10,"o":{},"c":1.0}`, `{"a":12345678901234567890.10,"o":{"b":1e400},"c":1.0}`},
		{"same name, other spelling", `{"a":1}`, `{"\u0061":2}`, `{"\u0061":2}`, `{"a":2}`, `{"a":2}`},
		{"names given twice", `{"a":1,"b":1,"a":2}`, `{"c":1,"c":2}`, `{"c":1,"c":2}`, `{"a":2,"b":1,"c":2}`, `{"a":2,"b":1,"c":2}`},
		{"spaces", " { \"a\" : { \"x\" : 1 } } ", "\n{ \"a\" : { \"y\" : \"}\" } }",
			`{ "a" : { "y" : "}" } }`, `{"a":{ "y" : "}" }}`, `{"a":{"x":1,"y":"}"}}`},
		{"empty objects", `{}`, `{}`, `{}`, `{}`, `{}`},
		{"empty name", `{"":1}`, `{"":2}`, `{"":2}`, `{"":2}`, `{"":2}`},
		{"current is no JSON", `{"a":`, `{"b":1}`, `{"b":1}`, `{"b":1}`, `{"b":1}`},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			for strategy, want := range map[Strategy]string{
				"": test.replaced, StrategyReplace: test.replaced, StrategyMerge: test.merged, StrategyDeepMerge: test.deeplyDone,
			} {
				got, err := MergeMetadata(json.RawMessage(test.current), json.RawMessage(test.change), strategy)
				require.NoError(t, err, strategy)
				assert.Equal(t, want, string(got), strategy)
			}
		})
	}
}

func TestMergeMetadataErrors(t *testing.T) {
	t.Parallel()
	object := json.RawMessage(`{}`)
	for _, strategy := range []Strategy{"Replace", "deepmerge", "x"} {
		_, err := MergeMetadata(object, object, strategy)
		require.ErrorIs(t, err, ErrStrategy)
	}
	for _, change := range []string{``, `{`, "\"\xff\""} {
		_, err := MergeMetadata(object, json.RawMessage(change), StrategyMerge)
		require.ErrorIs(t, err, ErrNotJSON, change)
	}
	nested := func(n int) json.RawMessage {
		return json.RawMessage(strings.Repeat(`{"a":`, n) + `1` + strings.Repeat(`}`, n))
	}
	_, err := MergeMetadata(nested(MaxMergeDepth), nested(MaxMergeDepth), StrategyDeepMerge)
	require.NoError(t, err)
	_, err = MergeMetadata(nested(MaxMergeDepth+1), nested(MaxMergeDepth+1), StrategyDeepMerge)
	require.ErrorIs(t, err, ErrTooDeep)
	_, err = MergeMetadata(nested(MaxDepth), nested(MaxDepth), StrategyMerge)
	require.NoError(t, err, "a flat merge does not go down")
	_, err = MergeMetadata(nil, nested(MaxDepth+1), StrategyReplace)
	require.ErrorIs(t, err, ErrTooDeep)
}

func TestMergeMetadataChangesNoArgument(t *testing.T) {
	t.Parallel()
	current, change := json.RawMessage(`{"a":{"x":1},"b":2}`), json.RawMessage(`{"a":{"y":2},"c":3}`)
	_, err := MergeMetadata(current, change, StrategyDeepMerge)
	require.NoError(t, err)
	assert.Equal(t, `{"a":{"x":1},"b":2}`, string(current))
	assert.Equal(t, `{"a":{"y":2},"c":3}`, string(change))
}

func BenchmarkMergeMetadata(b *testing.B) {
	current := json.RawMessage(`{"userId":"user123","username":"Alice","settings":{"theme":"dark","lang":"en"}}`)
	change := json.RawMessage(`{"username":"Bob","settings":{"theme":"light"}}`)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := MergeMetadata(current, change, StrategyDeepMerge); err != nil {
			b.Fatal(err)
		}
	}
}

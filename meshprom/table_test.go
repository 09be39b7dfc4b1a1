package meshprom

import (
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/meshpresence/mesh"
)

// Each field of mesh.Stats is shown by exactly one metric, which names it, or left out on
// purpose.
func TestEveryFieldIsShown(t *testing.T) {
	t.Parallel()
	shown := make(map[string]string)
	for _, m := range table() {
		for _, f := range m.fields {
			if other, ok := shown[f]; ok {
				t.Errorf("%s is shown by %s and %s", f, other, m.name)
			}
			shown[f] = m.name
		}
	}
	stats := reflect.TypeFor[mesh.Stats]()
	plain := samples(t, mesh.Stats{})
	for i := range stats.NumField() {
		name := stats.Field(i).Name
		metric, ok := shown[name]
		why, left := leftOut[name]
		switch {
		case ok && left:
			t.Errorf("%s is left out (%s), but %s shows it", name, why, metric)
		case !ok && !left:
			t.Errorf("%s is not a metric: add it to the table or to leftOut", name)
		}
		delete(shown, name)
		var st mesh.Stats
		disturb(t, &st, i, 7)
		for line, value := range samples(t, st) {
			if plain[line] == value {
				continue
			}
			if family, _, _ := strings.Cut(line, "{"); !ok || !slices.Contains([]string{
				"mesh_" + metric, "mesh_" + metric + "_bucket", "mesh_" + metric + "_sum", "mesh_" + metric + "_count",
			}, family) {
				t.Errorf("%s shows in %s", name, line)
			}
		}
		if metric != "" && reflect.DeepEqual(samples(t, st), plain) {
			t.Errorf("%s does not show in %s", name, metric)
		}
	}
	for field, metric := range shown {
		t.Errorf("%s names %s, which does not exist", metric, field)
	}
	for field := range leftOut {
		if _, ok := stats.FieldByName(field); !ok {
			t.Errorf("%s is left out, but does not exist", field)
		}
	}
}

// samples returns the exposed values, by name and labels.
func samples(t testing.TB, st mesh.Stats) map[string]string {
	t.Helper()
	all := make(map[string]string)
	for line := range strings.Lines(exposition(t, NewCollector(fixed(st), Options{}))) {
		if !strings.HasPrefix(line, "#") {
			name, value, _ := strings.Cut(strings.TrimSpace(line), " ")
			all[name] = value
		}
	}
	return all
}

// A label has exactly the keys of the server's map, all of them from the start.
func TestLabelValues(t *testing.T) {
	t.Parallel()
	stats := reflect.TypeFor[mesh.Stats]()
	none := samples(t, mesh.Stats{})
	for _, m := range table() {
		if m.label == "" {
			continue
		}
		if f, _ := stats.FieldByName(m.fields[0]); f.Type.Kind() == reflect.Map {
			if has := slices.Sorted(slices.Values(m.values)); !slices.Equal(has, keysOf(t, m.fields[0])) {
				t.Errorf("%s has %v, and %s has %v", m.name, has, m.fields[0], keysOf(t, m.fields[0]))
			}
		}
		for _, value := range m.values {
			sample := "mesh_" + m.name
			if m.kind == histogram {
				sample += "_count"
			}
			if got := none[sample+"{"+m.label+`="`+value+`"}`]; got != "0" {
				t.Errorf("%s of %s is %q at the start", m.name, value, got)
			}
		}
	}
}

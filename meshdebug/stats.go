package meshdebug

import (
	"encoding/json"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"time"
	"unicode"

	"github.com/meshpresence/mesh"
)

// stats are all fields of mesh.Stats, in their order.
type stats []stat

type stat struct {
	field string
	value any
}

func statsOf(s mesh.Stats) stats {
	v := reflect.ValueOf(s)
	list := make(stats, 0, v.NumField())
	for i := range v.NumField() {
		if f := v.Type().Field(i); f.IsExported() {
			list = append(list, stat{f.Name, v.Field(i).Interface()})
		}
	}
	return list
}

// MarshalJSON implements json.Marshaler: an object, with durations in seconds.
func (s stats) MarshalJSON() ([]byte, error) {
	object := make(map[string]any, len(s))
	for _, f := range s {
		key, value := strings.ToLower(f.field[:1])+f.field[1:], f.value
		if d, ok := value.(time.Duration); ok {
			key, value = key+"Seconds", seconds(d)
			if d < 0 { // never
				value = -1
			}
		}
		object[key] = value
	}
	return json.Marshal(object)
}

// headline lists the fields that are shown above all others.
var headline = []string{"Connections", "Entries", "Rooms", "Watched", "Subscriptions", "Stale", "Unwritten"}

// figure is one number of the page.
type figure struct {
	Name  string
	Value string
	Parts []figure // of a map, those that are not 0
	Zero  bool     // the value is 0 or empty
}

// Headline returns the figures that are shown above all others.
func (s stats) Headline() (list []figure) {
	for _, f := range s {
		if slices.Contains(headline, f.field) {
			list = append(list, f.figure())
		}
	}
	return list
}

// Incarnation returns the server's incarnation, or "" if it does not run.
func (s stats) Incarnation() string {
	for _, f := range s {
		if id, ok := f.value.(string); ok && f.field == "Incarnation" {
			return id
		}
	}
	return ""
}

// Rest returns the other figures.
func (s stats) Rest() (list []figure) {
	for _, f := range s {
		if f.field != "Incarnation" && !slices.Contains(headline, f.field) {
			list = append(list, f.figure())
		}
	}
	return list
}

// distribution is the part of a histogram that the page uses.
type distribution interface {
	Count() uint64
	Quantile(q float64) time.Duration
}

func (s stat) figure() figure {
	f := figure{Name: words(s.field)}
	switch v := s.value.(type) {
	case time.Duration:
		if f.Value = duration(v); v < 0 {
			f.Value = "never"
		}
	case distribution:
		if f.Zero = v.Count() == 0; f.Zero {
			f.Value = "none"
			break
		}
		f.Value = fmt.Sprintf("median ≤ %s, 99 %% ≤ %s", duration(v.Quantile(.5)), duration(v.Quantile(.99)))
		f.Parts = []figure{{Name: "of", Value: grouped(v.Count())}}
	case bool:
		f.Value = map[bool]string{true: "yes", false: "no"}[v]
	default:
		f.read(reflect.ValueOf(s.value))
	}
	return f
}

// read fills in the figure of a plain value or a map.
func (f *figure) read(v reflect.Value) {
	switch v.Kind() {
	case reflect.Map:
		for it := v.MapRange(); it.Next(); {
			p := figure{Name: fmt.Sprint(it.Key())}
			if p.read(it.Value()); !p.Zero {
				f.Parts = append(f.Parts, p)
			}
		}
		slices.SortFunc(f.Parts, func(a, b figure) int { return strings.Compare(a.Name, b.Name) })
		if f.Zero = len(f.Parts) == 0; f.Zero {
			f.Value = "0"
		}
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64,
		reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		f.Value, f.Zero = grouped(v.Interface()), v.IsZero()
	default:
		f.Value = fmt.Sprint(v.Interface())
	}
}

// words splits a field's name into words: LeftAsked becomes "Left asked".
func words(name string) string {
	var b strings.Builder
	for i, r := range name {
		if i > 0 && unicode.IsUpper(r) {
			b.WriteByte(' ')
			r = unicode.ToLower(r)
		}
		b.WriteRune(r)
	}
	return b.String()
}

// grouped writes a whole number with a space for each thousand.
func grouped(n any) string {
	text := fmt.Sprint(n)
	sign := ""
	if strings.HasPrefix(text, "-") {
		sign, text = "−", text[1:]
	}
	for i := len(text) - 3; i > 0; i -= 3 {
		text = text[:i] + "\u202f" + text[i:]
	}
	return sign + text
}

// duration formats a duration for the page.
func duration(d time.Duration) string {
	sign := ""
	if d < 0 {
		sign, d = "−", -d
	}
	var text string
	switch {
	case d == 0:
		text = "0 s"
	case d < time.Millisecond:
		text = fmt.Sprintf("%d µs", d.Microseconds())
	case d < time.Second:
		text = fmt.Sprintf("%d ms", d.Milliseconds())
	case d < time.Minute:
		text = fmt.Sprintf("%.1f s", d.Truncate(100*time.Millisecond).Seconds())
	case d < time.Hour:
		text = pair(d, time.Minute, "min", time.Second, "s")
	case d < 48*time.Hour:
		text = pair(d, time.Hour, "h", time.Minute, "min")
	default:
		text = fmt.Sprintf("%d days", d/(24*time.Hour))
	}
	return sign + text
}

// pair writes a duration in two units, or in one if the second is zero.
func pair(d, large time.Duration, a string, small time.Duration, b string) string {
	text := fmt.Sprintf("%d %s", d/large, a)
	if rest := d % large / small; rest > 0 {
		text += fmt.Sprintf(" %d %s", rest, b)
	}
	return text
}

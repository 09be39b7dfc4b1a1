package bench

import (
	"encoding/json"
	"fmt"

	"github.com/stretchr/testify/require"
)

// jobs holds the jobs that only one benchmark uses, by name.
var jobs = map[string]func(args json.RawMessage) (any, error){}

// job is a job that can be run in another process.
type job[A, R any] string

// newJob registers a job. do runs in the other process.
func newJob[A, R any](name string, do func(A) (R, error)) job[A, R] {
	jobs[name] = func(args json.RawMessage) (any, error) {
		var a A
		if err := json.Unmarshal(args, &a); err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		return do(a)
	}
	return job[A, R](name)
}

// on runs the job in a process and returns its result.
func (j job[A, R]) on(p *process, args A) (result R) {
	p.b.Helper()
	encoded, err := json.Marshal(args)
	require.NoError(p.b, err)
	require.NoError(p.b, json.Unmarshal(p.do(order{Job: string(j), Args: encoded}).Result, &result))
	return result
}

// carryOut runs a job in this process.
func carryOut(name string, args json.RawMessage) (json.RawMessage, error) {
	do, ok := jobs[name]
	if !ok {
		return nil, fmt.Errorf("no such job: %q", name)
	}
	result, err := do(args)
	if err != nil {
		return nil, err
	}
	return json.Marshal(result)
}

// kill ends the process at once (SIGKILL), like a crash.
func (p *process) kill() {
	p.b.Helper()
	require.NoError(p.b, p.cmd.Process.Kill())
	_ = p.cmd.Wait() // the error says that it was killed
}

// SPDX-License-Identifier: Apache-2.0

// Command grafana-dashboard holds a dashboard against Grafana's own schema: the dashboard, each panel's options by its
// kind, each query by its data source. In: a JSON file. Out: nothing, or what is wrong with it and exit code 1.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"

	"github.com/grafana/grafana-foundation-sdk/go/cog"
	"github.com/grafana/grafana-foundation-sdk/go/cog/plugins"
	"github.com/grafana/grafana-foundation-sdk/go/dashboard"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: grafana-dashboard FILE")
		os.Exit(2)
	}
	if err := check(os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// check reads twice: strictly, so that a field that Grafana does not know, or one of its own that is missing, is an
// error; and as it comes, since the strict way does not keep the panels.
func check(path string) error {
	plugins.RegisterDefaultPlugins()
	text, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	err = new(dashboard.Dashboard).UnmarshalJSONStrict(text)
	var wrong cog.BuildErrors // an empty list of errors is not nil
	if err != nil && (!errors.As(err, &wrong) || len(wrong) > 0) {
		return err
	}
	var found dashboard.Dashboard
	if err := json.Unmarshal(text, &found); err != nil {
		return err
	}
	for _, panel := range found.Panels {
		if panel.Panel == nil {
			continue
		}
		if _, known := cog.ConfigForPanelcfgVariant(panel.Panel.Type); !known {
			return fmt.Errorf("Grafana has no panel of the kind %q", panel.Panel.Type)
		}
	}
	return found.Validate()
}
